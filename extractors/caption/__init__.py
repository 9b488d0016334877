"""Captioners: vision-language models that describe images."""
