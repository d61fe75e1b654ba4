"""A mesh that exists only in numbers: traces, virtual nodes and virtual time for the real dispatcher.

    traces, generator ─▶ requests ─▶ workload (values, deadlines, tuning jobs; load) ─▶ tasks ┐
    devices ─▶ node types ────────────────────────────────────────────────────────────────────┤
                                                                 loop (virtual time) ◀────────┘
                                                                  │ ▲
                                                   coordinator.policy.dispatch.Dispatcher, as in production
                                                                  │
                                                                  └─▶ metrics ─▶ study (by policy and load)

Pure like all cores: no clock, no files, randomness from a seed. Same arguments, same bytes out.
"""
