"""What a window of the body's training costs in collectives and calls of the optimizer."""
