"""The network and its cut: client half, body, and the checkpoint they merge into."""
