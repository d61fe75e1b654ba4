"""How long the dispatcher thinks: one decision, as the coordinator and the simulator ask for it.

    python -m tests.benchmarks.decisions

``decision_ms``        1,000 waiting tasks, all of 16 nodes have just become free: the decision that starts 16
``decision_large_ms``  10,000 waiting tasks, 1,000 nodes at work, one becomes free: the decision that follows
``wave_ms``            10,000 waiting tasks, all of 1,000 nodes have just become free: 1,000 starts

Each is the median of some repetitions; the dispatcher is the coordinator's, explanations included: their
numbers are taken down as the decision is made, their words made when somebody asks (``task show``).
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import median
from time import perf_counter

from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Job, NodeView, Start
from coordinator.policy.dispatch import Dispatcher
from coordinator.policy.policies import DEFAULT_POLICY, policy_named
from coordinator.policy.rates import Rates
from coordinator.policy.work import Work
from mesh.ids import NodeId, TaskId

__all__ = ["decision_large_ms", "decision_ms", "wave_ms"]


def decision_ms(policy: str = DEFAULT_POLICY, *, repetitions: int = 15) -> float:
    """Milliseconds for 16 starts among 1,000 waiting tasks."""
    return median(_wave_ms(policy, 1000, 16, seed) for seed in range(repetitions))


def wave_ms(policy: str = DEFAULT_POLICY, *, repetitions: int = 3) -> float:
    """Milliseconds for 1,000 starts among 10,000 waiting tasks."""
    return median(_wave_ms(policy, 10_000, 1000, seed) for seed in range(repetitions))


def decision_large_ms(policy: str = DEFAULT_POLICY, *, repetitions: int = 50) -> float:
    """Milliseconds for the next start among 10,000 waiting tasks when one of 1,000 nodes becomes free."""
    dispatcher = _waiting(policy, 11_000, 1000, 0)
    _open_all(dispatcher, 1000, 0)
    started = [decision for decision in dispatcher.decide(1.0) if isinstance(decision, Start)]
    taken_ms = []
    for k, start in enumerate(started[:repetitions]):
        now = 1.0 + 0.01 * (k + 1)
        began = perf_counter()
        dispatcher.ended(start.task, now, Observed(service_s=start.why.service_s))
        dispatcher.decide(now)
        taken_ms.append(1000 * (perf_counter() - began))
    return median(taken_ms)


def _wave_ms(policy: str, n: int, m: int, seed: int) -> float:
    dispatcher = _waiting(policy, n, m, seed)
    _open_all(dispatcher, m, seed)
    began = perf_counter()
    decisions = dispatcher.decide(1.0)
    taken_ms = 1000 * (perf_counter() - began)
    n_started = sum(isinstance(decision, Start) for decision in decisions)
    assert n_started == m, f"{n_started} of {m} nodes got a task: nothing was measured"
    return taken_ms


def _waiting(policy: str, n: int, m: int, seed: int) -> Dispatcher:
    """``n`` tasks of all sorts that have waited for nodes that are not ready yet; none is hopeless."""
    rng = Random(seed)
    dispatcher = Dispatcher(policy_named(policy), CostModel())
    for view in _nodes(m, seed):
        dispatcher.put_node(replace(view, is_ready=False))
    for k in range(n):
        work = Work(n_prompt_tokens=rng.uniform(50, 2000), n_tokens=rng.uniform(10, 500))
        dispatcher.add(
            Job(
                task=TaskId(f"t{k:05}"),
                work=work,
                value=rng.choice([1.0, 3.0, 10.0]),
                arrived_at=0.0,
                deadline_at=rng.uniform(300, 900),
            ),
            0.0,
        )
    dispatcher.decide(0.5)  # what follows is no decision about newcomers
    return dispatcher


def _open_all(dispatcher: Dispatcher, m: int, seed: int) -> None:
    for view in _nodes(m, seed):
        dispatcher.put_node(view)


def _nodes(m: int, seed: int) -> list[NodeView]:
    rng = Random(f"nodes/{seed}")
    return [NodeView(id=NodeId(f"n{k:04}"), rates=Rates().scaled(rng.uniform(0.7, 6))) for k in range(m)]


if __name__ == "__main__":
    print(f"policy               {DEFAULT_POLICY}")
    print(f"decision_ms          {decision_ms():8.2f}")
    print(f"decision_large_ms    {decision_large_ms():8.2f}")
    print(f"wave_ms              {wave_ms():8.2f}")
