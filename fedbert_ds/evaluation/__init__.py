"""Measures of a finished checkpoint."""
