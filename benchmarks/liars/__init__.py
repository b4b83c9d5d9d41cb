"""How much liars among the clients cost, by how updates are combined."""
