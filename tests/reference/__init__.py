"""Slow, obvious versions of what must be fast; tests hold the fast ones against them."""
