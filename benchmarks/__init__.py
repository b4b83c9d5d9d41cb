"""Benchmarks for researchers, run from the repository's root as `python -m benchmarks.NAME`; not installed."""
