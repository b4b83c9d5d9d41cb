"""`fedbert-ds doctor`: what would stop a run here, each finding with its remedy."""
