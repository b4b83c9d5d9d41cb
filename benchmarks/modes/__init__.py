"""Federated modes beside centralized training on the same text."""
