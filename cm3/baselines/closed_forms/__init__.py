"""Baselines in closed form, one a file: `solve` returns embeddings or item weights."""
