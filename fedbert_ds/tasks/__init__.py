"""Labelled tasks: what they ask, how their files are read, how they are scored."""
