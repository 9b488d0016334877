"""Evaluation: full ranking, metrics, item weights."""
