"""Real English text of several domains, from packages that Debian distributes."""
