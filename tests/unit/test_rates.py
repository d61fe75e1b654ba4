"""What a node knows of its own speed before and after it has measured it."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import DecodeError
from mesh.messages import NodeRates
from mesh.wire import decode_json, encode_json
from node.compute.backbone.precision import Speed
from node.compute.rate_watch import RateWatch
from node.compute.rates import (
    RATES,
    RatedAs,
    echo_rates,
    guessed_rates,
    read_rates,
    slowed,
    write_rates,
)

MEASURED = NodeRates(
    prefill_tokens_per_s=200.0, decode_tokens_per_s=20.0, row_cost=0.25, features_tokens_per_s=220.0,
    tune_tokens_per_s=600.0, adapter_load_s=0.02,
)  # fmt: skip
GUESSED = replace(MEASURED, decode_tokens_per_s=7.0, origin="guessed")
HERE = RatedAs(digest="ab", precision="int8", device="cpu", threads=2)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A watch in a directory, its clock, and what it said; measuring takes ``n_pieces`` pieces."""

    def __init__(self, home: Path, *, n_pieces: int = 3, loads: list[bool] | None = None) -> None:
        self.clock = Clock()
        self.said: list[NodeRates] = []
        self.started: list[bool] = []
        self._n_pieces = n_pieces
        loads = loads or [False]
        self.watch = RateWatch(
            GUESSED,
            self.said.append,
            home=home,
            rated_as=HERE,
            measure=self._measure,
            clock=self.clock,
            busy=lambda: loads.pop(0) if len(loads) > 1 else loads[0],
        )

    def _measure(self, is_busy: bool) -> Generator[None, None, NodeRates]:
        self.started.append(is_busy)
        for _ in range(self._n_pieces):
            yield
        return MEASURED

    def idle(self, steps_max: int = 50) -> int:
        """Nothing else to do, for as long as it wants something; after how many steps it did not."""
        for step in range(steps_max):
            if (due_s := self.watch.due_s) is None:
                return step
            self.clock.now += due_s
            self.watch.step()
        return steps_max


# ── what is said ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong",
    [
        {"decode_tokens_per_s": 0.0}, {"prefill_tokens_per_s": -1.0}, {"tune_tokens_per_s": 1e10},
        {"row_cost": -0.1}, {"row_cost": 101.0}, {"adapter_load_s": -1.0}, {"emulated_slowdown": 0.5},
        {"emulated_slowdown": 2000.0}, {"decode_tokens_per_s": float("nan")},
    ],
)  # fmt: skip
def test_rates_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        replace(MEASURED, **wrong)


def test_rates_come_back_from_the_wire_and_an_unknown_origin_does_not() -> None:
    payload = encode_json(MEASURED)
    assert decode_json(payload, NodeRates) == MEASURED
    with pytest.raises(DecodeError, match="origin"):
        decode_json(payload.replace(b'"measured"', b'"heard"'), NodeRates)


def test_a_slowed_node_says_slower_rates_and_that_it_plays() -> None:
    four = slowed(MEASURED, 4)
    assert (four.decode_tokens_per_s, four.prefill_tokens_per_s, four.tune_tokens_per_s) == (5, 50, 150)
    assert (four.features_tokens_per_s, four.adapter_load_s, four.emulated_slowdown) == (55, 0.08, 4)
    assert four.row_cost == MEASURED.row_cost, "a share of a step is the same share of a slower one"
    assert slowed(MEASURED, 1) == MEASURED


def test_echo_says_the_rate_it_was_asked_for() -> None:
    assert echo_rates(30).decode_tokens_per_s == 30
    assert echo_rates(None).decode_tokens_per_s > 1000
    assert echo_rates(30).row_cost == 0


def test_a_guess_follows_the_size_of_the_model_or_what_its_format_was_measured_to_do() -> None:
    small, large = (guessed_rates(n, 30, can_tune=True) for n in (10**8, 10**10))
    assert small.decode_tokens_per_s == 100 * large.decode_tokens_per_s
    known = guessed_rates(10**8, 30, can_tune=False, speed=Speed(11.0, 99.0))
    assert (known.decode_tokens_per_s, known.prefill_tokens_per_s) == (11, 99)
    assert known.tune_tokens_per_s is None and known.features_tokens_per_s is None
    assert small.origin == known.origin == "guessed"


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────


def test_what_was_measured_is_there_at_the_next_start_for_exactly_the_same(tmp_path: Path) -> None:
    write_rates(tmp_path, HERE, MEASURED)
    assert read_rates(tmp_path, HERE) == MEASURED
    for other in ({"digest": "cd"}, {"precision": "fp32"}, {"device": "cuda"}, {"threads": 1}):
        assert read_rates(tmp_path, replace(HERE, **other)) is None  # type: ignore[arg-type]


def test_another_version_measures_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rates(tmp_path, HERE, MEASURED)
    monkeypatch.setattr("node.compute.rates.__version__", "9.9.9")
    assert read_rates(tmp_path, HERE) is None


def test_only_so_many_ways_to_run_a_model_are_kept_the_newest(tmp_path: Path) -> None:
    for threads in range(1, 41):
        write_rates(tmp_path, replace(HERE, threads=threads), MEASURED)
    assert len(json.loads((tmp_path / RATES).read_text())) == 16
    assert read_rates(tmp_path, replace(HERE, threads=40)) == MEASURED


@pytest.mark.parametrize("text", ["", "[]", "{", '{"x": 1}', "[1]"])
def test_a_damaged_file_is_no_measurement(tmp_path: Path, text: str) -> None:
    (tmp_path / RATES).write_text(text)
    assert read_rates(tmp_path, HERE) is None
    write_rates(tmp_path, HERE, MEASURED)
    assert read_rates(tmp_path, HERE) == MEASURED


@pytest.mark.parametrize("wrong", [{"decode_tokens_per_s": -3}, {"decode_tokens_per_s": "x"}, {"speed": 3}])
def test_damaged_rates_are_no_measurement(tmp_path: Path, wrong: dict[str, Any]) -> None:
    write_rates(tmp_path, HERE, MEASURED)
    stored = json.loads((tmp_path / RATES).read_text())
    stored[HERE.key] |= wrong
    (tmp_path / RATES).write_text(json.dumps(stored))
    assert read_rates(tmp_path, HERE) is None


# ── when it is measured ─────────────────────────────────────────────────────────────────────────────


def test_an_idle_calm_node_measures_once_keeps_it_and_says_so(tmp_path: Path) -> None:
    node = Watched(tmp_path)
    assert node.watch.due_s == 1.0, "who just joined is asked soon"
    assert node.idle() < 50
    assert (node.said, node.started, node.watch.rates) == ([MEASURED], [False], MEASURED)
    assert read_rates(tmp_path, HERE) == MEASURED


def test_work_ends_a_measurement_and_it_begins_again_when_all_is_calm(tmp_path: Path) -> None:
    node = Watched(tmp_path)
    node.idle(steps_max=2)
    node.watch.interrupt()
    assert node.watch.due_s == 1.0 and not node.said
    node.idle()
    assert node.started == [False, False] and node.said == [MEASURED]


def test_a_busy_machine_is_measured_but_says_so_and_nothing_is_kept(tmp_path: Path) -> None:
    node = Watched(tmp_path, loads=[True, False])
    node.idle(steps_max=4)
    assert [rates.origin for rates in node.said] == ["busy"] and read_rates(tmp_path, HERE) is None
    assert node.watch.due_s == 60.0
    node.idle()
    assert [rates.origin for rates in node.said] == ["busy", "measured"] and node.started == [True, False]


def test_a_machine_that_is_always_busy_is_left_alone_in_the_end(tmp_path: Path) -> None:
    node = Watched(tmp_path, loads=[True])
    node.idle()
    assert len(node.said) == 6 and node.watch.due_s is None


def test_two_processes_never_measure_at_once_and_the_second_takes_what_the_first_kept(tmp_path: Path) -> None:
    with (tmp_path / ".rates.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        node = Watched(tmp_path)
        node.idle(steps_max=5)
        assert not node.started
        write_rates(tmp_path, HERE, MEASURED)
    node.idle()
    assert node.said == [MEASURED] and not node.started


def test_a_measurement_that_breaks_leaves_the_guess_and_the_node(tmp_path: Path) -> None:
    node = Watched(tmp_path)

    def broken(_: bool) -> Generator[None, None, NodeRates]:
        yield
        raise RuntimeError("no memory")

    node.watch._measure = broken
    node.idle()
    assert not node.said and node.watch.rates == GUESSED and node.watch.due_s is None


def test_what_has_nothing_to_measure_never_wants_to() -> None:
    assert RateWatch(echo_rates(5), print).due_s is None
