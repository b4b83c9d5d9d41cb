"""`fedbert-ds certs`: an authority for one federation, and the certificates of its parties."""
