"""A whole simulated mesh: every core a node runs, engines, clients with tasks, and faults by seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random

from coordinator.stack import build_cores
from mesh.agreement.membership import INCARNATION_KEY
from mesh.core import Core, Message, Save
from mesh.facts import BrokerRef
from mesh.messages import NodeState
from tests.sim.checkers import disks_agree
from tests.sim.clients import SimClient, clients_of
from tests.sim.elections import is_settled
from tests.sim.engine import EngineShell, info_of
from tests.sim.faults import Faults, draw_faults
from tests.sim.hosted import HostingShell
from tests.sim.sharing import SharingShell, quotas_of
from tests.sim.world import Birth, World

__all__ = ["Mesh", "mesh_world"]


SITE_BROKER = BrokerRef(epoch=0, host=None, addresses=("site",), port=1883)


@dataclass(slots=True)
class Mesh:
    world: World
    clients: list[SimClient]

    @property
    def is_settled(self) -> bool:
        return is_settled(self.world)

    @property
    def is_on_one_broker(self) -> bool:
        lives = [self.world.hosts[node].life for node in self.world.remaining]
        links = [life.connection if life is not None else None for life in lives]
        return all(link is not None and link.is_open for link in links) and (
            len({link.broker.name for link in links if link is not None}) == 1
        )

    @property
    def are_clients_content(self) -> bool:
        return all(client.is_content for client in self.clients)

    @property
    def disks(self) -> dict[str, dict[str, Message]]:
        return {node: host.disk for node, host in self.world.hosts.items() if not host.is_lost}

    def storm(self, seconds: float) -> None:
        self.world.start_all()
        self.world.unleash()
        self.world.run(seconds)

    def heal(self, *, within_s: float) -> str | None:
        """End the faults and wait until nothing is left to do; what is wrong if that takes too long."""
        world = self.world
        world.heal()
        for node in world.remaining:
            world.drain(node, on=False)
        if not world.run_until(lambda: self.is_on_one_broker, within_s=within_s):
            return "no broker that all use"
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
        # One may have been acknowledged since: its result is on its way.
        if not world.run_until(
            lambda: self.are_clients_content and not disks_agree(self.disks), within_s=within_s
        ):
            return f"disks differ: {disks_agree(self.disks)}"
        return None


def build_with(
    wrap: Callable[[Core], Core], external: BrokerRef | None, quotas: Mapping[str, int]
) -> Callable[[Birth], Core]:
    def build(birth: Birth) -> Core:
        known = birth.disk.get(INCARNATION_KEY)
        incarnation = known.incarnation + 1 if isinstance(known, NodeState) else 1
        me = NodeState(node=birth.node, state="online", incarnation=incarnation, boot=birth.boot)
        birth.disk[INCARNATION_KEY] = me
        cores = build_cores(
            me=me,
            info=info_of(birth.node, cache_bytes=quotas.get(birth.node, 0)),
            records=birth.disk,
            rng=birth.rng,
            now=birth.now,
            external=external,
        )
        return wrap(cores.stack)

    return build


def mesh_world(
    seed: int,
    *,
    n_nodes: int | None = None,
    faults: Faults | None = None,
    one_at_a_time: bool = False,
    n_brokers: int = 1,
    wrap: Callable[[Core], Core] = lambda core: core,
    keeps: Callable[[Save], bool] = lambda save: True,
    n_tasks: int | None = None,
    length_s: float = 30.0,
    is_hosted: bool = False,
    is_shared: bool = False,
    slots_max: int = 3,
) -> Mesh:
    """Sizes (1 to 9), faults, load and the speed of engines are drawn, unless given.

    ``is_hosted``: there is no broker but those the nodes host themselves. ``is_shared``: nodes give bytes to
    the mesh's memory, hold blocks and let go of them.
    """
    rng = Random(f"draw/{seed}")
    n_nodes = n_nodes or rng.randint(1, 9)
    drawn = draw_faults(rng, one_at_a_time=one_at_a_time, brokers=n_brokers)
    shell_type = HostingShell if is_hosted else EngineShell
    shell = shell_type(seed, service_s=rng.choice((0.05, 0.5, 2.0)), failure_p=rng.choice((0.0, 0.0, 0.1)))
    shell.slots_max = slots_max
    shell.quotas = quotas_of(n_nodes) if is_shared else {}
    world = World(
        seed,
        n_nodes=n_nodes,
        build=build_with(wrap, None if is_hosted else SITE_BROKER, shell.quotas),
        faults=faults or drawn,
        shell=SharingShell(seed, shell) if is_shared else shell,
        brokers=[] if is_hosted else ["site", *(f"site-{index}" for index in range(1, n_brokers))],
        keeps=keeps,
    )
    n_clients = rng.randint(1, 2)
    clients = clients_of(world, n_clients, n_tasks or rng.choice((1, 2, 4, 8, 8, 20)), length_s)
    return Mesh(world, clients)
