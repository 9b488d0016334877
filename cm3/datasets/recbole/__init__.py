"""Atomic files of RecBole."""
