"""All cores of one node as one: what the driver hosts in production and the simulator in tests.

The cores of one node share two plain objects, the ``Fence`` (the highest epoch it has obeyed) and the
``RecordStore`` (what it has on disk about tasks); everything else they tell one another as facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

from coordinator.explainer import Explainer
from coordinator.facts import DrainChanged
from coordinator.holder import Holder
from coordinator.policy.policies import DEFAULT_POLICY, POLICIES, Policy
from coordinator.scheduler import Scheduler, SchedulerConfig
from coordinator.spreading import Spreading
from coordinator.store import RecordStore
from coordinator.worker import Worker, WorkerConfig
from mesh.agreement.election import Election, ElectionConfig
from mesh.agreement.fence import FENCE_KEY, Fence
from mesh.agreement.hosting import Hosting, HostingConfig
from mesh.agreement.membership import Membership, MembershipConfig
from mesh.agreement.versions import Versions
from mesh.cache.sharding import Sharding, ShardingConfig
from mesh.core import FOREVER, Effect, Fact, Message, Notify, Stack
from mesh.facts import BrokerRef, OwnStanding
from mesh.ids import EPOCH_ZERO, NodeId
from mesh.messages import EpochSeen, NodeInfo, NodeState

__all__ = ["Cores", "build_cores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """One node's cores. Only the stack is fed; the others are here to be read."""

    stack: Stack
    hosting: Hosting
    membership: Membership
    election: Election
    scheduler: Scheduler
    holder: Holder
    worker: Worker
    sharding: Sharding
    fence: Fence
    store: RecordStore
    versions: Versions


def build_cores(
    *,
    me: NodeState,
    info: NodeInfo,
    records: Mapping[str, Message],
    rng: Random,
    now: float,
    external: BrokerRef | None = None,
    may_host: bool = True,
    policy: Policy = POLICIES[DEFAULT_POLICY],
    hosting: HostingConfig | None = None,
    membership: MembershipConfig | None = None,
    election: ElectionConfig | None = None,
    scheduler: SchedulerConfig | None = None,
    worker: WorkerConfig | None = None,
    sharding: ShardingConfig | None = None,
) -> Cores:
    """The cores of node ``me.node``, carrying on from what its journal holds.

    Args:
        me: This life's first state; its incarnation is durable and higher than any before.
        records: The journal's records by key.
        external: The site's own broker, if the operator named one: then none is hosted.
        policy: Which task goes to which node first, see ``coordinator.policy.policies``.
    """
    node = me.node
    seen = records.get(FENCE_KEY)
    fence = Fence(seen.epoch if isinstance(seen, EpochSeen) else EPOCH_ZERO)
    store = RecordStore(now=now, journal=records)
    parts = (
        Hosting(me=node, rng=_own(rng), now=now, external=external, may_host=may_host, config=hosting),
        Membership(me=me, info=info, now=now, config=membership),
        Election(me=node, fence=fence, rng=_own(rng), now=now, config=election),
        Scheduler(
            me=node,
            fence=fence,
            store=store,
            rng=_own(rng),
            config=scheduler,
            policy=policy,
            claims=lambda holder, key: parts[6].claims(holder, key),
        ),
        Holder(me=node, fence=fence, store=store),
        Worker(me=node, fence=fence, store=store, now=now, config=worker),
        Sharding(
            me=node,
            info=info,
            life=me.incarnation,
            fence=fence,
            records=records,
            rng=_own(rng),
            now=now,
            config=sharding,
        ),
    )
    versions = Versions(node)
    return Cores(
        stack=Stack([*parts, Explainer(parts[3]), _Standing(), versions, Spreading(parts[3], versions)]),
        hosting=parts[0],
        membership=parts[1],
        election=parts[2],
        scheduler=parts[3],
        holder=parts[4],
        worker=parts[5],
        sharding=parts[6],
        fence=fence,
        store=store,
        versions=versions,
    )


class _Standing:
    """Says to membership, which knows nothing of work, what draining means for this node's standing."""

    wake_at = FOREVER

    def receive(self, message: Message, sender: NodeId, now: float) -> list[Effect]:
        return []

    def learn(self, fact: Fact, now: float) -> list[Effect]:
        if isinstance(fact, DrainChanged):
            return [Notify(OwnStanding("draining" if fact.draining else "online"))]
        return []

    def tick(self, now: float) -> list[Effect]:
        return []


def _own(rng: Random) -> Random:
    """A source of its own for each core: one core's draws do not shift another's."""
    return Random(rng.getrandbits(64))
