"""A mesh of election cores only, with the smallest command and receiver that can show an epoch obeyed."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from mesh.agreement.election import Election, Role
from mesh.agreement.fence import FENCE_KEY, Fence
from mesh.core import FOREVER, Core, Effect, Fact, Message, Save, Send, Stack
from mesh.facts import Deposed, Elected, MemberChanged
from mesh.ids import EPOCH_ZERO, Epoch, NodeId, TaskId
from mesh.messages import EpochSeen, Held, Recall, StaleCommand
from tests.sim.faults import Faults, draw_faults
from tests.sim.world import Birth, World

__all__ = ["Commander", "election_of", "election_world", "fence_from", "is_settled"]

COMMAND_EVERY_S = 0.4


class Commander:
    """While elected, commands everybody; like all, obeys what the fence admits and says so with ``Held``."""

    def __init__(self, nodes: list[NodeId], fence: Fence) -> None:
        self.nodes = nodes
        self.fence = fence
        self.epoch: Epoch | None = None
        self.wake_at = FOREVER

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        if not isinstance(message, Recall):
            return []
        if not self.fence.admits(message.epoch):
            return [Send(sender, StaleCommand(seen=self.fence.seen))]
        obeyed = Held(epoch=message.epoch, task=TaskId("t"), settled=False)
        return [*self.fence.raise_to(message.epoch), Send(sender, obeyed)]

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        if isinstance(fact, Elected):
            self.epoch, self.wake_at = fact.epoch, now
        elif isinstance(fact, Deposed):
            self.epoch, self.wake_at = None, FOREVER
        return []

    def tick(self, now: float) -> list[Effect]:
        assert self.epoch is not None
        self.wake_at = now + COMMAND_EVERY_S
        return [Send(node, Recall(epoch=self.epoch)) for node in self.nodes]


def fence_from(birth: Birth, fence_type: type[Fence] = Fence) -> Fence:
    record = birth.disk.get(FENCE_KEY)
    return fence_type(record.epoch if isinstance(record, EpochSeen) else EPOCH_ZERO)


def election_world(
    seed: int,
    *,
    n_nodes: int | None = None,
    faults: Faults | None = None,
    n_brokers: int = 1,
    ordered: bool | None = None,
    election_type: type[Election] = Election,
    fence_type: type[Fence] = Fence,
    wrap: Callable[[Core], Core] = lambda core: core,
    keeps: Callable[[Save], bool] = lambda save: True,
) -> World:
    """Sizes are drawn from 1 to 9 and faults from all kinds, unless given."""
    rng = Random(f"draw/{seed}")
    n_nodes = n_nodes or rng.randint(1, 9)
    drawn = draw_faults(rng, brokers=n_brokers, ordered=ordered)
    nodes = [NodeId(f"node-{index}") for index in range(n_nodes)]
    do_know_each_other = rng.random() < 0.5

    def build(birth: Birth) -> Core:
        fence = fence_from(birth, fence_type)
        election = election_type(me=birth.node, fence=fence, rng=birth.rng, now=birth.now)
        if do_know_each_other:
            for node in nodes:
                election.learn(MemberChanged(node, "alive", 1), birth.now)
        return wrap(Stack([election, Commander(nodes, fence)]))

    brokers = ["site", *(f"site-{index}" for index in range(1, n_brokers))]
    return World(seed, n_nodes=n_nodes, build=build, faults=faults or drawn, brokers=brokers, keeps=keeps)


def election_of(core: Core) -> Election:
    return next(part for part in core._cores if isinstance(part, Election))  # type: ignore[attr-defined]


def is_settled(world: World) -> bool:
    """One node coordinates, everybody runs, and all follow that one under the same epoch."""
    elections = [election_of(core) for core in world.cores().values()]
    acting = [election for election in elections if election.role is Role.COORDINATOR]
    return (
        len(elections) == len(world.remaining)
        and len(acting) == 1
        and all(e.coordinator == acting[0].me and e.epoch == acting[0].epoch for e in elections)
    )
