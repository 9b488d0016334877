"""The embedded sample shop."""
