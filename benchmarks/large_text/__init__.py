"""Memory of a client whose text is larger than its memory."""
