"""Deterministic simulator: the real cores under a simulated network, disks, clocks and engine, by seed.

``world`` hosts cores, ``network`` is brokers and connections as MQTT defines them, ``faults`` breaks
things, ``clients`` and ``engine`` give the mesh something to do, ``checkers`` read the history
afterwards and know nothing of the system. ``EDGEMESH_SIM_SEED=n`` replays one seed of every test.
"""
