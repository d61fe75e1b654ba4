"""Which task runs where, and when: value-density-first scheduling as pure objects and functions.

    work      what a task asks for          rates   how fast a node is       cost      seconds, learned
    density   the formulas                  policies  one function per policy, by name
    jobs      the table of waiting tasks    nodes   the table of nodes       dispatch  the decisions

The real coordinator (``coordinator.attempts``) and the simulator (``coordinator.virtual``) run this same
code. No clock, no randomness, no I/O: ``now`` is an argument everywhere.
"""
