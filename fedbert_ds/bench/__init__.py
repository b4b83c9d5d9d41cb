"""Measurements, each a `fedbert-ds bench NAME` that writes a record: what was run, on what, and the figures."""
