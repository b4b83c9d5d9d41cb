"""`fedbert-ds bench host`: the host's time for a micro-batch, beside plain transformers."""
