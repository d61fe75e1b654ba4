"""Knows tasks, values, deadlines and costs; decides who runs what and settles each task once."""
