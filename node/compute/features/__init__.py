"""Feature maps: what the frozen model computes once and nobody computes again."""
