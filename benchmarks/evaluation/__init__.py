"""Ways to batch held-out text, side by side."""
