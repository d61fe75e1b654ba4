"""Slow and obvious versions of fast code, to hold it against."""
