"""Which task runs where, and when: value-density-first scheduling as pure objects and functions.

    work      what a task asks for        rates     how fast a node is           cost      seconds, learned
    density   the formulas                policies  one function each, by name   foresight a plan that expects
    jobs      the table of who waits      nodes     the table of nodes           recent    who came lately
    pricing   costs as arrays             looking   scores, and what must not    ordering  ties, and where to
    books     who waits, what runs        starting  nodes with room are filled   giving_way  for whom
    dispatch  the queue, the decisions    preempting, explaining                 decisions in and out
    company   who runs there already      few       the same in plain numbers     tokens    in texts, learned

The real coordinator (``coordinator.placing``) and the simulator (``coordinator.virtual``) run this same code.
No clock, no randomness, no I/O: ``now`` is an argument everywhere.
"""
