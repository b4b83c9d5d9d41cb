"""The aggregator of another party: owns the client model, in a process of its own."""
