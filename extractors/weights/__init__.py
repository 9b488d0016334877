"""Model weights: hub, local files, digests, safe loading."""
