"""Held-out loss against windows, by the optimizer of the body's matrices."""
