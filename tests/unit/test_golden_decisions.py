"""What the dispatcher decides on a few seeded workloads, kept as digests: to make it faster is no reason to
decide otherwise. Who means to decide otherwise puts the new digests here and the figures of
``tests.benchmarks.vdf`` into docs/adr/0015.

Times are rounded to milliseconds: the last bits of ``exp`` are the processor's own.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from random import Random

import pytest

from coordinator.policy.policies import policy_named
from coordinator.virtual.devices import parse_nodes
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.loop import Deed, run
from coordinator.virtual.workload import Mix, at_load, tasks_of

ALONE = parse_nodes("1,1,0.5,6")
BATCHING = [replace(node, slots=4) for node in parse_nodes("1,2")]


@pytest.mark.parametrize(
    ("policy", "slots", "digest"),
    [
        ("foresight", 1, "c7a0084affc0"),
        ("foresight", 4, "6ce31096d9ce"),
        ("vdf", 1, "225867e3c8f5"),
        ("edf+drop+chunk", 1, "87dbb564be2b"),
        ("fifo", 4, "2755c8a8d58e"),
    ],
)
def test_a_seeded_workload_is_decided_as_ever(policy: str, slots: int, digest: str) -> None:
    nodes = ALONE if slots == 1 else BATCHING
    requests = generate(GeneratorSpec(tasks=100), Random("golden"))
    tasks = at_load(tasks_of(requests, Mix(tune=0.1), 7, nodes), nodes, 1.3)
    history: list[Deed] = []
    run(tasks, nodes, policy_named(policy), failover_every_s=60.0, history=history)
    lines = "\n".join(f"{deed.at:.3f} {deed.verb} {deed.task} {deed.node} {deed.how}" for deed in history)
    assert sha256(lines.encode()).hexdigest()[:12] == digest, "decided otherwise than before"
