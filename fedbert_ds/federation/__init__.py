"""How the clients' halves of the model are kept together: strategies, updates and their averages."""
