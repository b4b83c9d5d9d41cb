"""The client side: join, train a half on local text, keep its state."""
