"""`fedbert-ds bench NAME`: measurements for a user's own machine; each writes a record."""
