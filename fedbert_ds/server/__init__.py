"""The server side: plan a window, queue its micro-batches, run the body."""
