"""Memory of a client process, by phase of a run."""
