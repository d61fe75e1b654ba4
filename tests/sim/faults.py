"""What goes wrong, how often: drawn per seed (swarm testing), then injected until ``stop``.

Each seed leaves out a random subset of the kinds and gives the others wildly different rates: runs in
which everything fails a little all look the same (Groce et al., "Swarm testing", 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.world import World

__all__ = ["CALM", "CATCH_UP_S", "Chaos", "Faults", "draw_faults"]

# Faults that hit one node hit the one elected last this often: most rules are about it.
COORDINATOR_P = 0.4

# What a node that was away needs to hear what it missed, under the delays drawn here: to connect, to be
# asked (at most 5 s apart) and to be told.
CATCH_UP_S = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Rates are per simulated second for the whole mesh; ``…_p`` are probabilities per occasion."""

    delay_s_mean: float = 0.002
    spike_p: float = 0.0
    """A packet is late by up to ``spike_s``."""
    spike_s: float = 0.0
    drop_p: float = 0.0
    """A QoS 0 packet vanishes."""
    duplicate_p: float = 0.0
    """After a QoS 1 packet its connection sends the last few again, within ``spike_s`` + 1 s."""
    break_p: float = 0.0
    """A packet takes its connection with it; everything in flight on it is lost."""
    reorder: bool = False
    """Packets of one connection overtake one another: more than MQTT permits."""
    late_will_p: float = 0.0
    """The broker publishes a last will seconds late, after newer states."""
    partition_rate: float = 0.0
    broker_restart_rate: float = 0.0
    broker_forgets_p: float = 0.0
    """A broker restart loses what was retained."""
    kill_rate: float = 0.0
    pause_rate: float = 0.0
    pause_s_max: float = 10.0
    crash_amid_p: float = 0.0
    """The process dies between two effects of one input."""
    pause_amid_p: float = 0.0
    """The process is stopped between two effects of one input: the rest goes out late."""
    engine_loss_rate: float = 0.0
    drain_rate: float = 0.0
    lag_p: float = 0.0
    """A tick comes up to 0.5 s late."""
    move_rate: float = 0.0
    """A node moves to another broker, where a world has several."""
    drift: float = 0.0
    """Clocks run fast or slow by up to this share."""
    loses_a_node: bool = False
    """One machine is gone for good, with its disk, at some moment of the first minute."""
    one_at_a_time: bool = False
    """At most one node is down, stopped or cut off at a time, and the last one is back for ``CATCH_UP_S``."""


CALM = Faults()


def _log_uniform(rng: Random, least: float, most: float) -> float:
    return float(least * (most / least) ** rng.random())


def draw_faults(
    rng: Random, *, one_at_a_time: bool = False, brokers: int = 1, ordered: bool | None = None
) -> Faults:
    """A random subset of the kinds at random rates. ``ordered`` forces MQTT's order (or its absence).

    ``one_at_a_time`` also keeps the network good enough that nobody who lives is taken for dead: a false
    death of one node while another is away is two failures at once.
    """

    def maybe(least: float, most: float) -> float:
        return _log_uniform(rng, least, most) if rng.random() < 0.5 else 0.0

    drawn = Faults(
        delay_s_mean=_log_uniform(rng, 0.0005, 0.15),
        spike_p=maybe(0.001, 0.1),
        spike_s=_log_uniform(rng, 0.1, 6.0),
        drop_p=maybe(0.01, 0.5),
        duplicate_p=maybe(0.01, 0.3),
        break_p=maybe(0.0002, 0.01),
        reorder=rng.random() < 0.2,
        late_will_p=maybe(0.05, 1.0),
        partition_rate=maybe(0.01, 0.3),
        broker_restart_rate=maybe(0.01, 0.15),
        broker_forgets_p=rng.choice((0.0, 0.5, 1.0)),
        kill_rate=maybe(0.02, 0.4),
        pause_rate=maybe(0.02, 0.4),
        pause_s_max=_log_uniform(rng, 0.3, 10.0),
        crash_amid_p=maybe(0.0003, 0.03),
        pause_amid_p=maybe(0.0003, 0.03),
        engine_loss_rate=maybe(0.01, 0.2),
        drain_rate=maybe(0.01, 0.1),
        lag_p=maybe(0.01, 0.3),
        move_rate=maybe(0.02, 0.3) if brokers > 1 else 0.0,
        drift=rng.choice((0.0, 0.0001, 0.01)),
        one_at_a_time=one_at_a_time,
    )
    if one_at_a_time:
        drawn = replace(
            drawn,
            loses_a_node=rng.random() < 0.5,
            drop_p=min(drawn.drop_p, 0.02),
            delay_s_mean=min(drawn.delay_s_mean, 0.05),
            spike_s=min(drawn.spike_s, 1.0),
            break_p=0.0,  # a link that breaks by itself would be a second node in trouble
            reorder=False,
        )
    return drawn if ordered is None else replace(drawn, reorder=not ordered)


class Chaos:
    """Injects the rate-driven faults from now on; ``World.heal`` stops it."""

    def __init__(self, world: World, rng: Random) -> None:
        self._world = world
        self._rng = rng
        self._is_on = True
        faults = world.faults
        for rate, action in (
            (faults.partition_rate, self._partition),
            (faults.broker_restart_rate, self._restart_broker),
            (faults.kill_rate, self._kill),
            (faults.pause_rate, self._pause),
            (faults.engine_loss_rate, self._lose_engine),
            (faults.drain_rate, self._drain),
            (faults.move_rate, self._move),
        ):
            if rate:
                self._again(rate, action)

        if faults.loses_a_node and len(world.hosts) > 1:
            world.queue.after(rng.uniform(8, 40), self._lose_a_node)

    def stop(self) -> None:
        self._is_on = False

    def _again(self, rate: float, action: Callable[[], None]) -> None:
        self._world.queue.after(self._rng.expovariate(rate), self._fire, rate, action)

    def _fire(self, rate: float, action: Callable[[], None]) -> None:
        if self._is_on:
            action()
            self._again(rate, action)

    def _victim(self) -> str | None:
        world = self._world
        if world.faults.one_at_a_time and not world.is_all_well():
            return None
        if world.last_elected in world.remaining and self._rng.random() < COORDINATOR_P:
            return world.last_elected
        return self._rng.choice(world.remaining)

    def _partition(self) -> None:
        if (node := self._victim()) is not None:
            self._world.cut_off(node, _log_uniform(self._rng, 0.2, 15.0))

    def _restart_broker(self) -> None:
        world = self._world
        brokers = [broker for broker in world.network.brokers.values() if broker.is_up]
        if brokers and not (world.faults.one_at_a_time and not world.is_all_well()):
            broker = self._rng.choice(brokers)
            if broker.host is not None:
                world.crash_broker(broker)
                return
            keeps = self._rng.random() >= world.faults.broker_forgets_p
            world.network.restart_broker(
                broker, keeps_retained=keeps, down_s=_log_uniform(self._rng, 0.05, 5.0)
            )

    def _kill(self) -> None:
        if (node := self._victim()) is not None and self._world.hosts[node].life is not None:
            if self._rng.random() < 0.2:
                self._world.leave(node)
            else:
                self._world.kill(node, is_power_cut=self._rng.random() < 0.3)
            # Longer than a goodbye takes: a start that comes before the end is no start.
            self._world.queue.after(0.25 + _log_uniform(self._rng, 0.05, 12.0), self._world.start, node)

    def _pause(self) -> None:
        if (node := self._victim()) is not None:
            self._world.pause(node, self._rng.uniform(0.05, self._world.faults.pause_s_max))

    def _lose_a_node(self) -> None:
        node = self._victim()
        if node is not None and self._is_on:
            self._world.lose(node)
        elif self._is_on:
            self._world.queue.after(1.0, self._lose_a_node)

    def _lose_engine(self) -> None:
        self._world.lose_engine(self._rng.choice(list(self._world.hosts)))

    def _drain(self) -> None:
        self._world.drain(self._rng.choice(list(self._world.hosts)), on=self._rng.random() < 0.5)

    def _move(self) -> None:
        node = self._rng.choice(list(self._world.hosts))
        self._world.move(node, self._rng.choice(list(self._world.network.brokers)))
