"""What a run says of itself: metrics, live progress, the report."""
