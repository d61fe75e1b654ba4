"""Finds peers, talks, agrees, and moves bytes. Knows nothing of language models."""
