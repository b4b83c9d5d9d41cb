"""`fedbert-ds vocab`: one vocabulary for many owners, of whose text nobody sees more than words."""
