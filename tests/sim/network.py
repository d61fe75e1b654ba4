"""Brokers and connections, as MQTT over TCP behaves and no better.

What a broker gives: one total order per broker life, retained messages, last wills, one connection per
client name (a second takes it over). What a connection gives: order in each direction, until it breaks
and everything in flight is lost. QoS 0 may vanish; the last QoS 1 packets may all come again, in order
(1 2 3 4 3 4). ``Faults.reorder`` takes the order away too, which MQTT does not allow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from mesh import topics
from mesh.ids import NodeId
from mesh.messages import NodeForgotten, NodeState, TaskForgotten
from mesh.topics import Topic
from tests.sim.events import EventQueue
from tests.sim.faults import Faults

__all__ = ["SITE", "Broker", "Connection", "Endpoint", "Network"]

SITE = "site"
"""Where the site's own broker lives: a machine of its own that is cut off from nobody by a node's death."""

# Unacknowledged packets that are sent again after a hiccup; real clients keep about twenty in flight.
RESEND_MAX = 4
RESENT = -1  # in place of a QoS: neither dropped nor sent a third time
KEEPALIVE_S = 3.0  # 1.5 times the bus's 2 s, as the standard has it
BACKOFF_S = (0.05, 0.6)
# A retained TaskResult can be cleared only by the coordinator; a run makes a few dozen tasks.
RETAINED_MAX = 2000

_NODE_ROWS = (
    *(topics.STATE, topics.INFO, topics.METRICS, topics.COORDINATOR, topics.SUBMIT, topics.CANCEL),
    *(topics.RING, topics.CATALOGUE),
)
_CLIENT_ROWS = (topics.STATUS, topics.RESULT)
_NODE_ROW_NAMES = frozenset(row.name for row in _NODE_ROWS)
_CLIENT_ROW_NAMES = frozenset(row.name for row in _CLIENT_ROWS)

Key = tuple[str, Hashable]


class Endpoint(Protocol):
    """One client of a broker: a life of a node, or a client program."""

    name: str
    place: str
    """The machine it runs on, for partitions."""
    is_node: bool
    connection: Connection | None
    is_connecting: bool

    def uses(self) -> str | None:
        """The name of the broker it wants to be connected to."""

    def is_running(self) -> bool:
        """Whether its process exists (it may be stopped)."""

    def is_stopped(self) -> bool: ...

    def hears(self, row: str, key: Hashable) -> bool:
        """Whether it subscribes to this client topic."""

    def will(self) -> NodeState | None: ...

    def on_message(self, message: Any, sender: str) -> None: ...

    def on_link_up(self, broker: Broker) -> None: ...

    def on_link_down(self, host_is_dead: bool) -> None: ...


class Connection:
    """One TCP connection. ``cut_up``/``cut_down`` say that what is in flight that way is lost."""

    __slots__ = (
        "broker", "cut_down", "cut_up", "down_at", "endpoint", "is_open",
        "sent_down", "sent_up", "up_at", "will",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint, broker: Broker, will: NodeState | None, now: float) -> None:
        self.endpoint = endpoint
        self.broker = broker
        self.will = will
        self.up_at = self.down_at = now
        self.cut_up = self.cut_down = False
        self.sent_up: deque[tuple[Any, ...]] = deque(maxlen=RESEND_MAX)
        self.sent_down: deque[tuple[Any, ...]] = deque(maxlen=RESEND_MAX)
        """The last QoS 1 packets that way, which may all be sent again, in order, as MQTT has it."""
        self.is_open = False
        """The client knows that it is connected and subscribed."""


@dataclass(slots=True)
class Broker:
    name: str
    place: str
    epoch: int
    host: NodeId | None
    is_up: bool
    life: int
    """Counts restarts that lost or rolled back what was retained: each life is one total order."""
    n_starts: int
    nodes: dict[str, Connection]
    clients: dict[str, Connection]
    retained: dict[Key, tuple[Topic, Any, str]]
    stalled_until: float = 0.0
    refuses: bool = True
    """While down: its machine answers that nobody listens."""

    @property
    def incarnation(self) -> str:
        return f"{self.name}/{self.life}"

    def connections(self) -> list[Connection]:
        return [*self.nodes.values(), *self.clients.values()]

    def table(self, endpoint: Endpoint) -> dict[str, Connection]:
        return self.nodes if endpoint.is_node else self.clients


class Network:
    def __init__(self, queue: EventQueue, rng: Random, faults: Faults) -> None:
        self.queue = queue
        self.faults = faults
        self.brokers: dict[str, Broker] = {}
        self.n_delivered = 0
        self.wire: Callable[[str, Hashable, Any], Any] | None = None
        """If set, every published message goes through it: (sender, topic's key, message) -> message."""
        self._rng = rng
        self._blocked_until: dict[tuple[str, str], float] = {}

    # ── brokers ─────────────────────────────────────────────────────────────────────────────────────

    def add_broker(
        self, name: str, *, place: str = SITE, epoch: int = 0, host: NodeId | None = None
    ) -> Broker:
        broker = Broker(name, place, epoch, host, True, 0, 1, {}, {}, {})
        self.brokers[name] = broker
        return broker

    def restart_broker(self, broker: Broker, *, keeps_retained: bool, down_s: float) -> None:
        if not broker.is_up:
            return
        self.stop_broker(broker)
        if not keeps_retained:
            broker.retained.clear()
            broker.life += 1
        self.queue.after(down_s, self._start_broker, broker)

    def stop_broker(self, broker: Broker, *, is_power_cut: bool = False) -> None:
        """It is gone and publishes no wills. Its clients hear so, or by a power cut only their own timers."""
        broker.is_up = False
        broker.refuses = not is_power_cut
        for connection in broker.connections():
            connection.cut_up = connection.cut_down = True
            after_s = self._rng.uniform(0.5, 1.0) * KEEPALIVE_S if is_power_cut else self._delay()
            self.queue.after(after_s, self._client_notices, connection)
        broker.nodes.clear()
        broker.clients.clear()

    def stall_broker(self, broker: Broker, length_s: float) -> None:
        """Its process is stopped: a short stop is a delay, a long one breaks every keep-alive."""
        broker.stalled_until = max(broker.stalled_until, self.queue.now + length_s)
        for connection in broker.connections():
            self._interrupt(connection, broker.stalled_until, length_s)

    def _interrupt(self, connection: Connection, until: float, length_s: float) -> None:
        if length_s > KEEPALIVE_S * 0.5:
            self.break_connection(connection, slowly=True)
        else:
            connection.up_at = max(connection.up_at, until)
            connection.down_at = max(connection.down_at, until)

    def _start_broker(self, broker: Broker) -> None:
        broker.is_up = True
        broker.n_starts += 1

    # ── connecting ──────────────────────────────────────────────────────────────────────────────────

    def connect(self, endpoint: Endpoint, after_s: float = 0.0) -> None:
        """Go on trying until connected to what ``endpoint.uses()`` says."""
        if not endpoint.is_connecting:
            endpoint.is_connecting = True
            self.queue.after(after_s, self._try, endpoint)

    def _try(self, endpoint: Endpoint) -> None:
        if not endpoint.is_running():
            return
        name = endpoint.uses()
        broker = self.brokers.get(name) if name is not None else None
        if endpoint.is_stopped() or broker is None or not broker.is_up or self._is_blocked(endpoint, broker):
            if (
                broker is not None
                and not broker.is_up
                and broker.host is not None
                and not endpoint.is_stopped()
            ):
                endpoint.on_link_down(True)  # connection refused: its host is gone
            self.queue.after(self._rng.uniform(*BACKOFF_S), self._try, endpoint)
            return
        self.queue.after(self._delay() * 3, self._accept, endpoint, broker, broker.n_starts)

    def _is_refused(self, endpoint: Endpoint, broker: Broker) -> bool:
        """The machine of a broker that the mesh hosts says at once that it is gone."""
        is_gone = not broker.is_up and broker.refuses and broker.host is not None
        return is_gone and not endpoint.is_stopped() and not self._is_blocked(endpoint, broker)

    def _accept(self, endpoint: Endpoint, broker: Broker, n_starts: int) -> None:
        """The broker's side of CONNECT and SUBSCRIBE, in one step."""
        if not endpoint.is_running():
            return
        is_gone = not broker.is_up or broker.n_starts != n_starts or self._is_blocked(endpoint, broker)
        if is_gone or endpoint.uses() != broker.name:
            self.queue.after(self._rng.uniform(*BACKOFF_S), self._try, endpoint)
            return
        endpoint.is_connecting = False
        table = broker.table(endpoint)
        if (old := table.pop(endpoint.name, None)) is not None:  # taken over: its will is published
            old.cut_up = old.cut_down = True
            self._publish_will(old)
            if old.endpoint is not endpoint:  # two processes under one name
                self.queue.after(self._delay(), self._client_notices, old)
        connection = Connection(endpoint, broker, endpoint.will(), self.queue.now)
        table[endpoint.name] = connection
        endpoint.connection = connection
        self._down(connection, 1, self._arrive_link_up)
        for (row, key), (_, message, sender) in broker.retained.items():
            if row in _NODE_ROW_NAMES if endpoint.is_node else endpoint.hears(row, key):
                self._down(connection, 1, self._arrive, message, sender)

    def disconnect(self, endpoint: Endpoint) -> None:
        """The endpoint closes its connection itself (it moves to another broker): no will."""
        connection = endpoint.connection
        if connection is not None:
            endpoint.connection = None
            connection.will = None
            connection.cut_down = True
            self.queue.at(connection.up_at, self._broker_notices, connection)

    # ── breaking ────────────────────────────────────────────────────────────────────────────────────

    def break_connection(self, connection: Connection, *, slowly: bool = False) -> None:
        """All in flight is lost. Both ends notice at once, or each by its own keep-alive."""
        connection.cut_up = connection.cut_down = True
        for notice in (self._broker_notices, self._client_notices):
            after_s = self._rng.uniform(0.5, 1.0) * KEEPALIVE_S if slowly else self._delay()
            self.queue.after(after_s, notice, connection)

    def process_gone(self, connection: Connection, *, is_power_cut: bool) -> None:
        """A killed process's kernel still sends what was written and closes; a power cut does neither."""
        connection.cut_down = True
        if is_power_cut:
            connection.cut_up = True
            self.queue.after(self._rng.uniform(0.5, 1.0) * KEEPALIVE_S, self._broker_notices, connection)
        else:
            self.queue.at(
                max(connection.up_at, self.queue.now + self._delay()), self._broker_notices, connection
            )

    def endpoint_stopped(self, endpoint: Endpoint) -> None:
        """SIGSTOP: the broker gives up on it after the keep-alive, if it is stopped that long."""
        if endpoint.connection is not None:
            self.queue.after(KEEPALIVE_S, self._keepalive_over, endpoint.connection, self.queue.now)

    def _keepalive_over(self, connection: Connection, since: float) -> None:
        if connection.endpoint.is_stopped() and connection.endpoint.connection is connection:
            connection.cut_up = True
            self._broker_notices(connection)
            self._down(connection, 1, self._arrive_close)

    def block(self, place: str, other: str, length_s: float) -> None:
        """No packet between two places for a while. TCP bridges a short gap and gives up on a long one."""
        until = self.queue.now + length_s
        for pair in ((place, other), (other, place)):
            self._blocked_until[pair] = max(until, self._blocked_until.get(pair, 0.0))
        for broker in self.brokers.values():
            for connection in broker.connections():
                if {connection.endpoint.place, broker.place} == {place, other} and place != other:
                    self._interrupt(connection, until, length_s)

    def unblock(self) -> None:
        self._blocked_until.clear()
        for broker in self.brokers.values():
            broker.stalled_until = 0.0

    def is_reachable(self, place: str, other: str) -> bool:
        return self._blocked_until.get((place, other), 0.0) <= self.queue.now

    def _is_blocked(self, endpoint: Endpoint, broker: Broker) -> bool:
        return broker.stalled_until > self.queue.now or not self.is_reachable(endpoint.place, broker.place)

    def _client_notices(self, connection: Connection) -> None:
        if connection.endpoint.connection is connection:
            connection.endpoint.connection = None
            connection.endpoint.on_link_down(False)

    def _broker_notices(self, connection: Connection) -> None:
        table = connection.broker.table(connection.endpoint)
        if table.get(connection.endpoint.name) is connection:
            del table[connection.endpoint.name]
            self._publish_will(connection)

    def _publish_will(self, connection: Connection) -> None:
        if connection.will is None:
            return
        late_s = self._rng.uniform(0.1, 8.0) if self._rng.random() < self.faults.late_will_p else 0.0
        self.queue.after(
            late_s, self._publish_late, connection.broker, connection.broker.n_starts, connection.will
        )

    def _publish_late(self, broker: Broker, n_starts: int, will: NodeState) -> None:
        if broker.is_up and broker.n_starts == n_starts:
            self._at_broker(broker, topics.STATE, will.node, will, will.node)

    # ── publishing ──────────────────────────────────────────────────────────────────────────────────

    def publish(self, endpoint: Endpoint, row: Topic, key: Hashable, message: Any) -> None:
        """A failed publish is silent."""
        connection = endpoint.connection
        if connection is None or not connection.is_open:
            return
        if self.wire is not None:
            message = self.wire(endpoint.name, key, message)
        faults, rng = self.faults, self._rng
        if row.qos == 0 and faults.drop_p and rng.random() < faults.drop_p:
            return
        if faults.break_p and rng.random() < faults.break_p:
            self.break_connection(connection, slowly=rng.random() < 0.3)
            return
        self._up(connection, row, key, message)
        if row.qos == 1 and faults.duplicate_p:
            connection.sent_up.append((row, key, message))
            if rng.random() < faults.duplicate_p:
                self.queue.after(rng.uniform(0, faults.spike_s + 1), self._resend_up, connection)

    def _resend_up(self, connection: Connection) -> None:
        for packet in list(connection.sent_up):
            self._up(connection, *packet)

    def _resend_down(self, connection: Connection) -> None:
        for action, args in list(connection.sent_down):
            self._down(connection, RESENT, action, *args)

    def _up(self, connection: Connection, row: Topic, key: Hashable, message: Any) -> None:
        at = self.queue.now + self._delay()
        if not self.faults.reorder:
            at = connection.up_at = max(at, connection.up_at)
        self.queue.at(at, self._arrive_at_broker, connection, row, key, message)

    def _arrive_at_broker(self, connection: Connection, row: Topic, key: Hashable, message: Any) -> None:
        if connection.cut_up or not connection.broker.is_up:
            return
        self._at_broker(connection.broker, row, key, message, connection.endpoint.name)

    def _at_broker(self, broker: Broker, row: Topic, key: Hashable, message: Any, sender: str) -> None:
        if row.retain:
            broker.retained[row.name, key] = row, message, sender
            assert len(broker.retained) < RETAINED_MAX, "something is retained and never cleared"
        self._fan_out(broker, row, key, message, sender)

    def clear(self, endpoint: Endpoint, message: TaskForgotten | NodeForgotten) -> None:
        """Empty retained payloads: the rows forget. Readers pay no heed to them (``packets.read``)."""
        key = message.task if isinstance(message, TaskForgotten) else message.node
        for row in topics.CLEARS[type(message)]:
            if endpoint.connection is not None and endpoint.connection.is_open:
                at = self.queue.now + self._delay()
                if not self.faults.reorder:
                    at = endpoint.connection.up_at = max(at, endpoint.connection.up_at)
                self.queue.at(at, self._clear_at_broker, endpoint.connection, row, key)

    def _clear_at_broker(self, connection: Connection, row: Topic, key: Hashable) -> None:
        if not connection.cut_up and connection.broker.is_up:
            connection.broker.retained.pop((row.name, key), None)

    def _fan_out(self, broker: Broker, row: Topic, key: Hashable, message: Any, sender: str) -> None:
        name = row.name
        if name in _NODE_ROW_NAMES:
            for connection in broker.nodes.values():
                self._down(connection, row.qos, self._arrive, message, sender)
        elif name == "INBOX":
            if (to := broker.nodes.get(str(key))) is not None:
                self._down(to, row.qos, self._arrive, message, sender)
        elif name in _CLIENT_ROW_NAMES or name == "REPLY":
            for connection in broker.clients.values():
                if connection.endpoint.hears(name, key):
                    self._down(connection, row.qos, self._arrive, message, sender)

    def _down(self, connection: Connection, qos: int, action: Any, *args: Any) -> None:
        """One packet from a broker to a client."""
        faults = self.faults
        if qos == 0 and faults.drop_p and self._rng.random() < faults.drop_p:
            return
        at = self.queue.now + self._delay()
        if not faults.reorder:
            at = connection.down_at = max(at, connection.down_at)
        self.queue.at(at, action, connection, *args)
        if qos == 1 and args and faults.duplicate_p:
            connection.sent_down.append((action, args))
            if self._rng.random() < faults.duplicate_p:
                self.queue.after(self._rng.uniform(0, faults.spike_s + 1), self._resend_down, connection)

    def _arrive(self, connection: Connection, message: Any, sender: str) -> None:
        if not connection.cut_down and connection.endpoint.connection is connection:
            self.n_delivered += 1
            connection.endpoint.on_message(message, sender)

    def _arrive_link_up(self, connection: Connection) -> None:
        if not connection.cut_down and connection.endpoint.connection is connection:
            connection.is_open = True
            connection.endpoint.on_link_up(connection.broker)

    def _arrive_close(self, connection: Connection) -> None:
        connection.cut_down = True
        self._client_notices(connection)

    def _delay(self) -> float:
        faults, rng = self.faults, self._rng
        delay_s = rng.expovariate(1.0) * faults.delay_s_mean
        if faults.spike_p and rng.random() < faults.spike_p:
            delay_s += rng.uniform(0, faults.spike_s)
        return delay_s
