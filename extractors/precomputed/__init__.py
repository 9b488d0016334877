"""Embeddings computed elsewhere."""
