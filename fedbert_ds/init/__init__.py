"""Writes a run file for given machines, so that nobody needs to know all keys to start."""
