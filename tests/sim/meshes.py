"""A whole simulated mesh: every core a node runs, engines, clients with tasks, and faults by seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from coordinator.holder import Holder
from coordinator.scheduler import Scheduler
from coordinator.store import RecordStore
from coordinator.worker import Worker
from mesh.core import Core, Save, Stack
from mesh.election import Election
from mesh.fence import Fence
from mesh.membership import INCARNATION_KEY, Membership
from mesh.messages import NodeState, TaskRecord
from tests.sim.clients import SimClient, clients_of
from tests.sim.elections import fence_from, is_settled
from tests.sim.engine import EngineShell, info_of
from tests.sim.faults import Faults, draw_faults
from tests.sim.world import Birth, World

__all__ = ["Mesh", "Parts", "mesh_world"]


@dataclass(frozen=True, slots=True)
class Parts:
    """The classes a node is built from; mutants replace one."""

    fence: type[Fence] = Fence
    election: type[Election] = Election
    scheduler: type[Scheduler] = Scheduler
    holder: type[Holder] = Holder
    worker: type[Worker] = Worker
    store: type[RecordStore] = RecordStore


@dataclass(slots=True)
class Mesh:
    world: World
    clients: list[SimClient]

    @property
    def is_settled(self) -> bool:
        return is_settled(self.world)

    @property
    def are_clients_content(self) -> bool:
        return all(client.is_content for client in self.clients)

    @property
    def n_open_on_disks(self) -> int:
        return sum(
            isinstance(record, TaskRecord) and record.outcome is None
            for host in self.world.hosts.values()
            for record in host.disk.values()
        )

    def storm(self, seconds: float) -> None:
        self.world.start_all()
        self.world.unleash()
        self.world.run(seconds)

    def heal(self, *, within_s: float) -> str | None:
        """End the faults and wait until nothing is left to do; what is wrong if that takes too long."""
        world = self.world
        world.heal()
        for node in world.hosts:
            world.drain(node, on=False)
        if not world.run_until(lambda: self.is_settled, within_s=within_s):
            return "no coordinator that all follow"
        if not world.run_until(lambda: self.are_clients_content, within_s=within_s):
            missing = [
                task
                for client in self.clients
                for task, asked in client.tasks.items()
                if asked.is_acknowledged and not asked.is_over
            ]
            return f"acknowledged, and no result came: {missing}"
        if not world.run_until(lambda: not self.n_open_on_disks, within_s=within_s):
            return "a disk still has an open record of a task that ended"
        return None


def build_with(parts: Parts) -> Callable[[Birth], Core]:
    def build(birth: Birth) -> Core:
        known = birth.disk.get(INCARNATION_KEY)
        incarnation = known.incarnation + 1 if isinstance(known, NodeState) else 1
        me = NodeState(node=birth.node, state="online", incarnation=incarnation, boot=birth.boot)
        fence = fence_from(birth, parts.fence)
        store = parts.store(now=birth.now, journal=birth.disk)
        return Stack(
            [
                Membership(me=me, info=info_of(birth.node), now=birth.now),
                parts.election(me=birth.node, fence=fence, rng=birth.rng, now=birth.now),
                parts.scheduler(me=birth.node, fence=fence, store=store, rng=birth.rng),
                parts.holder(me=birth.node, fence=fence, store=store),
                parts.worker(me=birth.node, fence=fence, store=store, now=birth.now),
            ]
        )

    return build


def mesh_world(
    seed: int,
    *,
    n_nodes: int | None = None,
    faults: Faults | None = None,
    one_at_a_time: bool = False,
    n_brokers: int = 1,
    parts: Parts | None = None,
    keeps: Callable[[Save], bool] = lambda save: True,
    n_tasks: int | None = None,
    length_s: float = 30.0,
) -> Mesh:
    """Sizes (1 to 9), faults, load and the speed of engines are drawn, unless given."""
    rng = Random(f"draw/{seed}")
    n_nodes = n_nodes or rng.randint(1, 9)
    drawn = draw_faults(rng, one_at_a_time=one_at_a_time, brokers=n_brokers)
    shell = EngineShell(seed, service_s=rng.choice((0.05, 0.5, 2.0)), failure_p=rng.choice((0.0, 0.0, 0.1)))
    world = World(
        seed,
        n_nodes=n_nodes,
        build=build_with(parts or Parts()),
        faults=faults or drawn,
        shell=shell,
        brokers=["site", *(f"site-{index}" for index in range(1, n_brokers))],
        keeps=keeps,
    )
    n_clients = rng.randint(1, 2)
    clients = clients_of(world, n_clients, n_tasks or rng.randint(1, 8), length_s)
    return Mesh(world, clients)
