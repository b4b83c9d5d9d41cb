"""What each wire codec costs in loss, and in bytes."""
