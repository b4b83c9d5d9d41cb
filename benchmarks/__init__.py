"""Benchmarks for researchers: `python -m benchmarks.NAME` in the repository's root."""
