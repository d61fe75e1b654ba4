"""What a node computes, in a process of its own (``python -m node.compute``). Torch lives here only."""
