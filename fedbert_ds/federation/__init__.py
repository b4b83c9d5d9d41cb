"""How client halves are kept together: strategies, client updates and their averages."""
