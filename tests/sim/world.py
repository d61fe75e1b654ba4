"""Hosts with disks that run real cores, and everything that can happen to them.

    world = World(seed, n_nodes=5, build=build, faults=draw_faults(rng))
    world.run(seconds=30)      # the safety phase: anything may break
    world.heal()               # nothing breaks any more, everybody is started
    world.run(seconds=20)      # the liveness phase: now it must come to rest
    check(world.history)

The world keeps the promises of ``mesh.core`` and no others: effects in order, ``Save`` durable before
the next effect, ``tick`` before ``receive`` once ``wake_at`` has passed, own monotonic time, silent
failure of what is sent. Everything random comes from the seed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Protocol

from mesh import topics
from mesh.core import Broadcast, Core, Effect, Fact, Message, Notify, Save, Send
from mesh.facts import Elected, Leaving, LinkDown, LinkUp
from mesh.ids import Boot, NodeId, new_boot
from mesh.messages import CancelTask, Drain, LeaseRecord, NodeForgotten, NodeState, TaskForgotten, TaskReply
from tests.sim.clock import LocalClock
from tests.sim.events import EventQueue
from tests.sim.faults import CALM, CATCH_UP_S, Chaos, Faults
from tests.sim.history import Entry, History
from tests.sim.network import BACKOFF_S, SITE, Broker, Connection, Network

__all__ = ["Birth", "Host", "Life", "Shell", "World", "seeds", "will_of"]

# A core whose wake_at stays in the past after its tick would spin the real driver.
TICKS_AT_ONCE_MAX = 50

LEAVE_S = 0.2

# Crashes and stops between effects hit a promise on its way to the disk this much more often.
SAVE_WEIGHT = 10


@dataclass(frozen=True, slots=True)
class Birth:
    """What a process knows when it starts; what its shell writes to ``disk`` is durable before that."""

    node: NodeId
    boot: Boot
    disk: dict[str, Message]
    rng: Random
    now: float


class Shell(Protocol):
    """The part of a simulated process that is neither core nor network: its engine, its broker, …"""

    def on_start(self, life: Life) -> None: ...

    def on_fact(self, life: Life, fact: Fact) -> None: ...

    def on_end(self, life: Life) -> None: ...


@dataclass(slots=True)
class Host:
    """A machine: its disk outlives its lives."""

    node: NodeId
    place: str
    disk: dict[str, Message] = field(default_factory=dict)
    life: Life | None = None
    n_lives: int = 0
    is_unplugged: bool = False
    is_lost: bool = False
    """Burnt with its disk: it never comes back."""


class Life:
    """One process of one node: a core, its clock, and what waits for it while it is stopped."""

    is_node = True

    def __init__(self, world: World, host: Host, boot: Boot, clock: LocalClock) -> None:
        self.world = world
        self.host = host
        self.name: str = host.node
        self.place = host.place
        self.boot = boot
        self.clock = clock
        self.connection: Connection | None = None
        self.is_connecting = False
        self.is_alive = True
        self.is_leaving = False
        self.is_unplugged = False
        """It ended by a power cut, so nothing on its machine answers."""
        self.broker_name: str | None = world.broker_of(host.node)
        self.core: Core
        self._stopped_until = 0.0
        self._waiting: deque[tuple[Callable[..., list[Effect]], tuple[Any, ...]]] = deque()
        self._unsent: list[Effect] = []  # effects of the input during which the process was stopped
        self._tick_at = float("inf")
        self.wake_at = float("inf")
        """The core's, as it was after its last input: it changes only with one."""

    # ── what the network asks ───────────────────────────────────────────────────────────────────────

    def uses(self) -> str | None:
        return self.broker_name

    def is_running(self) -> bool:
        return self.is_alive

    def is_stopped(self) -> bool:
        return self._stopped_until > self.world.queue.now

    def hears(self, row: str, key: Hashable) -> bool:
        return False

    def will(self) -> NodeState | None:
        return will_of(self.core)

    def on_message(self, message: Message, sender: str) -> None:
        self._take(self.core.receive, message, sender)

    def on_link_up(self, broker: Broker) -> None:
        self._take(self._learn_link_up, LinkUp(broker.epoch, broker.host))

    def on_link_down(self, host_is_dead: bool) -> None:
        self._take(self._learn_link_down, LinkDown(host_is_dead))

    def _learn_link_up(self, fact: LinkUp, now: float) -> list[Effect]:
        self.world.trouble_at = self.world.queue.now
        self.world.note(fact, self)
        return self.core.learn(fact, now)

    def _learn_link_down(self, fact: LinkDown, now: float) -> list[Effect]:
        self.world.trouble_at = self.world.queue.now
        self.world.network.connect(self, self.world.rng.uniform(*BACKOFF_S))
        return self.core.learn(fact, now)

    def learn(self, fact: Fact) -> None:
        """A fact from the shell (engine, broker)."""
        self._take(self.core.learn, fact)

    # ── running ─────────────────────────────────────────────────────────────────────────────────────

    def now(self) -> float:
        return self.clock.local(self.world.queue.now)

    def stop_for(self, length_s: float) -> None:
        self._stopped_until = max(self._stopped_until, self.world.queue.now + length_s)
        self.world.network.endpoint_stopped(self)
        self.world.queue.at(self._stopped_until, self.resume)

    def resume(self) -> None:
        """What the process was in the middle of goes out first, then time, then what arrived meanwhile."""
        if not self.is_alive or self.is_stopped():
            return
        self.world.trouble_at = self.world.queue.now
        unsent, self._unsent = self._unsent, []
        self.carry_out(unsent)
        while self._waiting and self.is_alive and not self.is_stopped():
            self._step(*self._waiting.popleft())
        self.schedule_tick()

    def continue_now(self) -> None:
        """Healing: SIGCONT at once."""
        self._stopped_until = 0.0
        self.resume()

    def _take(self, method: Callable[..., list[Effect]], *args: Any) -> None:
        if not self.is_alive:
            return
        if self.is_stopped() or self._waiting:
            self._waiting.append((method, args))
            return
        self._step(method, args)
        self.schedule_tick()

    def _step(self, method: Callable[..., list[Effect]], args: tuple[Any, ...]) -> None:
        self._tick_if_due()
        if not self.is_alive:
            return
        if self.is_stopped():
            self._waiting.appendleft((method, args))
            return
        if self.world.is_traced:
            print(f"{self.world.queue.now:9.3f} {self.name} <- {args}")
        effects = method(*args, self.now())
        self.wake_at = self.core.wake_at
        self.carry_out(effects)

    def _tick_if_due(self) -> None:
        for _ in range(TICKS_AT_ONCE_MAX):
            now = self.now()
            if not (self.is_alive and self.wake_at <= now) or self.is_stopped():
                return
            effects = self.core.tick(now)
            self.wake_at = self.core.wake_at
            self.carry_out(effects)
        raise AssertionError(f"{self.name}: wake_at {self.wake_at} stays at or before now {self.now()}")

    def schedule_tick(self) -> None:
        """One timer, moved only forward in time when it fires: cheaper than one per input."""
        if not self.is_alive or self.wake_at == float("inf"):
            return
        due_at = max(self.clock.true(self.wake_at) + 1e-6, self.world.queue.now)
        if due_at < self._tick_at:
            lag_p = self.world.faults.lag_p
            if lag_p and self.world.rng.random() < lag_p:
                due_at += self.world.rng.uniform(0, 0.5)
            self._tick_at = due_at
            self.world.queue.at(due_at, self._on_timer, due_at)

    def _on_timer(self, due_at: float) -> None:
        if due_at != self._tick_at or not self.is_alive:
            return  # an earlier one was set meanwhile
        self._tick_at = float("inf")
        if not self.is_stopped():
            self._tick_if_due()
            self.schedule_tick()

    def carry_out(self, effects: Sequence[Effect]) -> None:
        world = self.world
        if not effects:
            return
        if self._unsent:  # stopped in the middle of an earlier input's effects: order is kept
            self._unsent += effects
            return
        faults, rng = world.faults, world.rng
        cut = -1
        does_crash = False
        if faults.crash_amid_p or faults.pause_amid_p:
            weight = SAVE_WEIGHT if any(isinstance(effect, Save) for effect in effects) else 1
            if rng.random() < faults.crash_amid_p * weight:
                cut, does_crash = rng.randrange(len(effects) + 1), True
            elif rng.random() < faults.pause_amid_p * weight:
                cut = rng.randrange(len(effects) + 1)
        if cut >= 0 and not world.may_break(self.host.node):
            cut = -1
        for index, effect in enumerate(effects):
            if index == cut:
                break
            world.carry_out(self, effect)
            if not self.is_alive:
                return
        if cut < 0:
            return
        if does_crash:
            world.kill(self.host.node, is_power_cut=rng.random() < 0.3)
            world.queue.after(rng.uniform(0.05, 8.0), world.start, self.host.node)
        else:
            self._unsent = list(effects[cut:])
            self.stop_for(rng.uniform(0.05, faults.pause_s_max))


class World:
    """Args:
    build: Makes the core of one life from what its process knows at birth.
    shell: Called for each life's facts; the engine and such.
    keeps: Whether the disk keeps this save; only mutants say no.
    """

    def __init__(
        self,
        seed: int | str,
        *,
        n_nodes: int,
        build: Callable[[Birth], Core],
        faults: Faults = CALM,
        shell: Shell | None = None,
        brokers: Sequence[str] = (SITE,),
        keeps: Callable[[Save], bool] = lambda save: True,
    ) -> None:
        self.seed = seed
        self.rng = Random(f"world/{seed}")
        self.queue = EventQueue()
        self.faults = self.drawn = faults
        self.network = Network(self.queue, Random(f"network/{seed}"), faults)
        self.history = History()
        self.is_traced = bool(os.environ.get("EDGEMESH_SIM_TRACE"))
        self.shell = shell
        self._build = build
        self._keeps = keeps
        for name in brokers:
            self.network.add_broker(name, place=name)
        self._broker_of: dict[NodeId, str | None] = {}
        self.hosts: dict[NodeId, Host] = {}
        for index in range(n_nodes):
            node = NodeId(f"node-{index}")
            self._broker_of[node] = brokers[0] if brokers else None
            self.hosts[node] = Host(node, node)
        self._chaos: Chaos | None = None
        self.last_elected: NodeId | None = None
        """Whom faults like best."""
        self.trouble_at = 0.0
        """When a process, or its link, last stopped or came back."""

    # ── time ────────────────────────────────────────────────────────────────────────────────────────

    @property
    def now(self) -> float:
        return self.queue.now

    def run(self, seconds: float) -> None:
        self.queue.run_until(self.queue.now + seconds)

    def run_until(self, is_met: Callable[[], bool], *, within_s: float, step_s: float = 0.25) -> bool:
        """Whether it came true in time."""
        until = self.now + within_s
        while not is_met():
            if self.now >= until:
                return False
            self.run(step_s)
        return True

    def start_all(self) -> None:
        for node in self.hosts:
            self.queue.after(self.rng.uniform(0, 2.0), self.start, node)

    def unleash(self) -> None:
        """Start the faults that come at a rate."""
        self._chaos = Chaos(self, Random(f"chaos/{self.seed}"))

    def heal(self) -> None:
        """From now on nothing breaks: everybody runs, reaches the first broker, and is heard."""
        if self._chaos is not None:
            self._chaos.stop()
        self.faults = self.network.faults = CALM
        self.network.unblock()
        for node in self.remaining:
            host = self.hosts[node]
            if host.life is None:
                self.start(node)
            else:
                host.life.continue_now()
            if self._broker_of[node] is not None:
                self.move(node, next(iter(self.network.brokers)))

    # ── hosts ───────────────────────────────────────────────────────────────────────────────────────

    def start(self, node: NodeId) -> None:
        host = self.hosts[node]
        if host.life is not None or host.is_lost:
            return
        host.n_lives += 1
        rng = Random(f"{self.seed}/{node}/{host.n_lives}")
        life = Life(self, host, new_boot(rng), LocalClock.draw(rng, self.faults.drift, self.now))
        host.life = life
        life.core = self._build(Birth(node, life.boot, host.disk, rng, life.now()))
        life.wake_at = life.core.wake_at
        self.note("started", life)
        if self.shell is not None:
            self.shell.on_start(life)
        self.network.connect(life, self.rng.uniform(0.02, 0.2))
        life.schedule_tick()

    def kill(self, node: NodeId, *, is_power_cut: bool = False) -> None:
        host = self.hosts[node]
        life = host.life
        if life is None:
            return
        host.life = None
        life.is_alive = False
        host.is_unplugged = life.is_unplugged = is_power_cut
        self.note("killed", life)
        if life.connection is not None:
            self.network.process_gone(life.connection, is_power_cut=is_power_cut)
            life.connection = None
        if self.shell is not None:
            self.shell.on_end(life)

    def restart(self, node: NodeId) -> None:
        self.kill(node)
        self.start(node)

    def leave(self, node: NodeId) -> None:
        """The process says goodbye, as by Ctrl-C, and ends a moment later without a last will."""
        life = self.hosts[node].life
        if life is not None and not life.is_stopped():
            self.note("leaves", life)
            life.is_leaving = True
            life.learn(Leaving())
            self.queue.after(LEAVE_S, self._left, node, life)

    def _left(self, node: NodeId, life: Life) -> None:
        if self.hosts[node].life is life:
            self.network.disconnect(life)
            self.kill(node)

    def lose(self, node: NodeId) -> None:
        """The machine and its disk are gone for good."""
        self.kill(node, is_power_cut=True)
        self.hosts[node].is_lost = True
        self.trouble_at = self.now

    @property
    def remaining(self) -> list[NodeId]:
        return [node for node, host in self.hosts.items() if not host.is_lost]

    def pause(self, node: NodeId, length_s: float) -> None:
        life = self.hosts[node].life
        if life is not None:
            self.note(f"stopped for {length_s:.2f} s", life)
            life.stop_for(length_s)
            stall = getattr(self.shell, "stall", None)
            if stall is not None:
                stall(life, length_s)

    def cut_off(self, node: NodeId, length_s: float) -> None:
        """No packet between this node and any broker's place, nor any other node."""
        life = self.hosts[node].life
        if life is not None:
            self.note(f"cut off for {length_s:.2f} s", life)
        places = [broker.place for broker in self.network.brokers.values()]
        for place in dict.fromkeys([*places, *self.hosts]):
            if place != node:
                self.network.block(node, place, length_s)

    def move(self, node: NodeId, broker: str) -> None:
        """The node uses another broker from now on."""
        if self._broker_of[node] == broker:
            return
        self._broker_of[node] = broker
        life = self.hosts[node].life
        if life is not None:
            self.use_broker(life, broker)

    def use_broker(self, life: Life, broker: str | None) -> None:
        if life.broker_name == broker and life.connection is not None:
            return
        life.broker_name = broker
        if life.connection is not None:
            self.network.disconnect(life)
            life.on_link_down(False)
        else:
            self.network.connect(life)

    def crash_broker(self, broker: Broker) -> None:
        """A broker that a node hosts ends by itself; the node lives on."""
        crash = getattr(self.shell, "crash", None)
        if crash is not None:
            crash(broker, self.hosts[broker.place].life)

    def drain(self, node: NodeId, *, on: bool) -> None:
        life = self.hosts[node].life
        if life is not None:
            life.on_message(Drain(on=on), "operator")

    def lose_engine(self, node: NodeId) -> None:
        life = self.hosts[node].life
        lose = getattr(self.shell, "lose", None)
        if life is not None and lose is not None:
            lose(life)

    def broker_of(self, node: NodeId) -> str | None:
        return self._broker_of[node]

    def is_well(self, node: NodeId) -> bool:
        life = self.hosts[node].life
        return (
            life is not None
            and not life.is_leaving
            and life.connection is not None
            and life.connection.is_open
            and not life.is_stopped()
            and all(self.network.is_reachable(node, broker.place) for broker in self.network.brokers.values())
        )

    def is_all_well(self) -> bool:
        """Everybody runs and listens, and nobody's link changed for long enough to have caught up."""
        return self.now - self.trouble_at >= CATCH_UP_S and all(self.is_well(node) for node in self.remaining)

    def may_break(self, node: NodeId) -> bool:
        return not self.faults.one_at_a_time or self.is_all_well()

    def cores(self) -> dict[NodeId, Core]:
        return {node: host.life.core for node, host in self.hosts.items() if host.life is not None}

    # ── effects ─────────────────────────────────────────────────────────────────────────────────────

    def carry_out(self, life: Life, effect: Effect) -> None:
        match effect:
            case Broadcast(message=message):
                self._broadcast(life, message)
            case Send(to=to, message=message):
                self.note(effect, life)
                self.network.publish(life, topics.INBOX, to, message)
            case Save(key=key, record=record):
                self.note(effect, life)
                if self._keeps(effect):
                    if record is None:
                        life.host.disk.pop(key, None)
                    else:
                        life.host.disk[key] = record
            case Notify(fact=fact):
                self.note(fact, life)
                if isinstance(fact, Elected):
                    self.last_elected = life.host.node
                if self.shell is not None:
                    self.shell.on_fact(life, fact)

    def _broadcast(self, life: Life, message: Message) -> None:
        if isinstance(message, TaskForgotten | NodeForgotten):
            self.network.clear(life, message)
            return
        if isinstance(message, LeaseRecord) and message.kind == "claim":
            self.note(message, life)
        row = topics.topic_of(message)
        key = life.name if row is topics.CATALOGUE else _key_of(message)
        self.network.publish(life, row, key, message)

    def note(self, what: Any, life: Life | None = None) -> None:
        if life is None:
            entry = Entry(self.now, "", "", "", what)
        else:
            connection = life.connection
            broker = connection.broker.incarnation if connection is not None else ""
            entry = Entry(self.now, life.name, life.boot, broker, what)
        self.history.append(entry)
        if self.is_traced:
            print(f"{entry.at:9.3f} {entry.node:8} {entry.boot[:4]:4} {entry.broker:8} {what}")


def _key_of(message: Message) -> Hashable:
    """What tells this message's topic from the others of its row."""
    if isinstance(message, TaskReply):
        return message.reply_to
    if isinstance(message, CancelTask):
        return message.task
    return (
        getattr(message, "node", None) if hasattr(message, "incarnation") else getattr(message, "task", None)
    )


def will_of(core: Core) -> NodeState | None:
    """The last will a node's bus registers: what its membership core says of itself, but offline."""
    for part in getattr(core, "_cores", (core,)):
        state = getattr(part, "state", None)
        if isinstance(state, NodeState):
            return replace(state, state="offline")
    return None


def seeds(n: int, first: int = 0) -> Sequence[int]:
    """``n`` seeds from ``first`` on, a fifth of them unless ``EDGEMESH_LONG`` is set.

    With ``EDGEMESH_SIM_SEED`` that one alone, in the first block.
    """
    one = os.environ.get("EDGEMESH_SIM_SEED")
    if one:
        return [int(one)] if first == 0 else []
    return range(first, first + (n if os.environ.get("EDGEMESH_LONG") else n // 5))
