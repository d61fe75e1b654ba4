"""One edgemesh process: this machine's facts, its compute, its shells and its faces to people."""

__version__ = "0.1.0"
