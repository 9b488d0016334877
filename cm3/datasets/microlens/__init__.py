"""MicroLens."""
