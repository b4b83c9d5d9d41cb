"""The client side: join, train a half on local text, keep a state where the mode needs one."""
