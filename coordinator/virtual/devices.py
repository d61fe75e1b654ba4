"""The nodes of a virtual mesh: by relative speeds, by the names of devices, or from a TOML file.

[[node]]
device = "pi5"                  # figures of a known kind of device, or all of your own below
count = 3

[[node]]
device = "orin"
name = "garage"                 # [the device and a number]
slots = 4                       # attempts at once
speed = 0.8                     # all rates times this
decode_tokens_per_s = 55        # one rate of its own; see `edgemesh nodes --json` for yours
joins_at_s = 600                # not there before
leaves_at_s = 3000              # leaves without a word; what it runs starts again elsewhere
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

from coordinator.policy.rates import Rates
from mesh.core import FOREVER
from mesh.errors import ConfigError
from mesh.ids import NodeId, is_id

__all__ = ["DEVICES", "UNIT", "NodeSpec", "nodes_of_speeds", "parse_nodes", "read_mesh", "together"]

NODES_MAX = 1000
SPEED_MAX = 10_000.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One virtual node as it says of itself; what work truly takes there, the loop keeps to itself."""

    id: NodeId
    rates: Rates
    slots: int = 1
    joins_at: float = 0.0
    leaves_at: float = FOREVER


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    rates: Rates
    slots: int
    what: str


def _rates(
    prefill: float, decode: float, row_cost: float, features: float, tune: float, adapter_load_s: float
) -> Rates:
    return Rates(
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        row_cost=row_cost,
        features_tokens_per_s=features,
        tune_tokens_per_s=tune,
        adapter_load_s=adapter_load_s,
    )


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "pi4": Device(rates=_rates(90, 10, 0.25, 100, 170, 0.1), slots=2, what="Raspberry Pi 4"),
        "pi5": Device(rates=_rates(200, 20, 0.20, 220, 400, 0.05), slots=4, what="Raspberry Pi 5"),
        "laptop": Device(rates=_rates(700, 50, 0.12, 770, 1400, 0.03), slots=8, what="laptop, 8 cores"),
        "desktop": Device(rates=_rates(1400, 80, 0.10, 1500, 2800, 0.02), slots=16, what="desktop, 16 cores"),
        "orin": Device(rates=_rates(3000, 70, 0.06, 3300, 6000, 0.03), slots=16, what="Jetson Orin Nano"),
        "gpu-server": Device(
            rates=_rates(30_000, 200, 0.02, 33_000, 60_000, 0.02), slots=16, what="one data-centre GPU"
        ),
    }
)
"""Rough figures for a model of 135 million parameters, for plans and not for promises: a mesh file takes the
rates that your own nodes measured."""

# The unit of ``--nodes 1,1,0.5,6``: a Pi 5 that serves one request at a time.
UNIT = replace(DEVICES["pi5"].rates, row_cost=0.0)


def nodes_of_speeds(speeds: Iterable[float]) -> tuple[NodeSpec, ...]:
    """Nodes of one slot, each so many times as fast as a Pi 5.

    Raises:
        ConfigError: A speed is not a positive number, or there are too many.
    """
    return _checked(
        NodeSpec(id=NodeId(f"n{k}"), rates=_scaled(UNIT, speed)) for k, speed in enumerate(speeds, 1)
    )


def parse_nodes(text: str) -> tuple[NodeSpec, ...]:
    """Nodes from ``1,1,0.5,6`` (relative speeds), ``3*pi5,orin`` (devices) or both.

    Raises:
        ConfigError: An item is neither; the text says what is known.
    """
    nodes: list[NodeSpec] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        count_text, _, name = item.rpartition("*")
        try:
            count = int(count_text) if count_text else 1
            if name in DEVICES:
                nodes += _of_device(name, count, nodes)
                continue
            speed = float(name)
        except ValueError:
            raise ConfigError(
                f"a node is a relative speed such as 0.5 or a device such as 3*pi5, not {item!r}; "
                f"devices: {', '.join(DEVICES)}"
            ) from None
        nodes += [
            NodeSpec(id=NodeId(f"n{len(nodes) + k}"), rates=_scaled(UNIT, speed)) for k in range(1, count + 1)
        ]
    return _checked(nodes)


def read_mesh(text: str, name: str) -> tuple[NodeSpec, ...]:
    """Nodes from a TOML file as shown above.

    Args:
        text: The file.
        name: Of the file, for errors.

    Raises:
        ConfigError: It is no TOML, or a table says something else than a node.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from None
    found = tables.pop("node", None)
    if tables or not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        extra = f", not {', '.join(sorted(tables))}" if tables else ""
        raise ConfigError(f'{name}: expected tables [[node]] with device = "pi5" or rates{extra}')
    nodes: list[NodeSpec] = []
    for number, table in enumerate(found, 1):
        try:
            nodes += _of_table(dict(table), nodes)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{name}, [[node]] number {number}: {error}") from None
        except ConfigError as error:
            raise ConfigError(f"{name}, [[node]] number {number}: {error}") from None
    try:
        return _checked(nodes)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def together(nodes: Sequence[NodeSpec], more: Sequence[NodeSpec]) -> tuple[NodeSpec, ...]:
    """A mesh and more nodes; names that are taken get a suffix.

    Raises:
        ConfigError: They are too many.
    """
    taken = {node.id for node in nodes}
    return _checked(
        [
            *nodes,
            *(replace(node, id=NodeId(f"{node.id}-added")) if node.id in taken else node for node in more),
        ]
    )


_OWN_RATES = tuple(one.name for one in fields(Rates) if one.name not in ("emulated_slowdown", "is_measured"))
_KEYS = ("device", "count", "name", "slots", "speed", "joins_at_s", "leaves_at_s", *_OWN_RATES)


def _of_table(table: dict[str, Any], before: Sequence[NodeSpec]) -> list[NodeSpec]:
    """Raises: ValueError, TypeError: A key or a value is wrong."""
    if unknown := sorted(set(table) - set(_KEYS)):
        raise ValueError(f"unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    count, name = table.get("count", 1), table.get("name")
    if not _is_whole(count) or not 1 <= count <= NODES_MAX:
        raise ValueError(f"count must be from 1 to {NODES_MAX}, got {count!r}")
    device = DEVICES.get(table.get("device", ""))
    own: dict[str, Any] = {key: _number(key, table[key]) for key in _OWN_RATES if key in table}
    if "device" in table and device is None:
        raise ValueError(f"unknown device {table['device']!r}; there are {', '.join(DEVICES)}")
    if device is None:
        needed = ("prefill_tokens_per_s", "decode_tokens_per_s")
        if missing := [key for key in needed if key not in own]:
            raise ValueError(f"without a device it needs {' and '.join(missing)}")
        rates = Rates(**{"row_cost": 0.2, **own})
    else:
        rates = replace(device.rates, **own)
    slots = table.get("slots", device.slots if device is not None else 1)
    if not _is_whole(slots) or not 1 <= slots <= 1024:
        raise ValueError(f"slots must be from 1 to 1024, got {slots!r}")
    spec = NodeSpec(
        id=NodeId("x"),
        rates=_scaled(rates, _number("speed", table.get("speed", 1.0))),
        slots=slots,
        joins_at=_number("joins_at_s", table.get("joins_at_s", 0.0)),
        leaves_at=_number("leaves_at_s", table.get("leaves_at_s", FOREVER)),
    )
    if not 0 <= spec.joins_at < spec.leaves_at:
        raise ValueError(f"it must join (at {spec.joins_at:g} s) before it leaves ({spec.leaves_at:g} s)")
    if name is not None and (not isinstance(name, str) or not is_id(name)):
        raise ValueError(f"name must be 1 to 63 of a-z, 0-9 and '-', not at an end; got {name!r}")
    return _named(spec, name or table.get("device", "node"), count, before, is_own=name is not None)


def _of_device(name: str, count: int, before: Sequence[NodeSpec]) -> list[NodeSpec]:
    device = DEVICES[name]
    if not 1 <= count <= NODES_MAX:
        raise ValueError(f"{count} nodes")
    return _named(NodeSpec(id=NodeId("x"), rates=device.rates, slots=device.slots), name, count, before)


def _named(
    spec: NodeSpec, stem: str, count: int, before: Sequence[NodeSpec], *, is_own: bool = False
) -> list[NodeSpec]:
    """``count`` nodes like ``spec``: ``pi5-1``, ``pi5-2``; a name that was given stays as it is."""
    if is_own and count == 1:
        return [replace(spec, id=NodeId(stem))]
    taken = {node.id for node in before}
    free = (name for k in range(1, len(taken) + count + 1) if (name := NodeId(f"{stem}-{k}")) not in taken)
    return [replace(spec, id=name) for name, _ in zip(free, range(count), strict=False)]


def _scaled(rates: Rates, speed: float) -> Rates:
    """Raises: ConfigError: ``speed`` is not one."""
    if not 0 < speed <= SPEED_MAX:
        raise ConfigError(f"a speed must be above 0 and at most {SPEED_MAX:g}, got {speed:g}")
    return rates.scaled(speed)


def _checked(nodes: Iterable[NodeSpec]) -> tuple[NodeSpec, ...]:
    known = tuple(nodes)
    if not 1 <= len(known) <= NODES_MAX:
        raise ConfigError(f"a mesh has 1 to {NODES_MAX} nodes, not {len(known)}")
    names = [node.id for node in known]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two nodes are called {doubled[0]}")
    return known


def _number(key: str, given: object) -> float:
    if not isinstance(given, int | float) or isinstance(given, bool) or given != given:
        raise ValueError(f"{key} must be a number, got {given!r}")
    return float(given)


def _is_whole(given: object) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)
