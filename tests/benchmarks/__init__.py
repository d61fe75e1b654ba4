"""``python -m tests.benchmarks.NAME [--quick] [--json]``: every claim about speed, measured."""
