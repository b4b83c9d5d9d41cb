"""How the client model is kept: its aggregator and reference, modes, client updates, averages."""
