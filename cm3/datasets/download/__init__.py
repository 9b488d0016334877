"""Download of published files."""
