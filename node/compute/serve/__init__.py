"""Serving: prompts to tokens, sequences that share steps, prefixes nobody computes twice."""
