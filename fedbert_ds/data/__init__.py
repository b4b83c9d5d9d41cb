"""Text: articles from files or hubs, shards for clients, packed masked-LM sequences."""
