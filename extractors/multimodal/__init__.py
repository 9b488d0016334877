"""Encoders of text and image together."""
