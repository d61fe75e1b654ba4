"""Prefixes of other nodes: never a wrong value, whatever comes, fails to come or comes late."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mesh.ids import TaskId
from node.compute.backbone.llama import LlamaBackbone
from node.compute.engine import Event
from node.compute.features.store import Entry, LocalStore
from node.compute.messages import Ended, Pause, Resume, Stop
from node.compute.model_engine import ModelEngine
from node.compute.serve import arrivals as arrivals_file
from node.compute.serve.prefix_disk import PrefixDisk
from node.compute.serve.shared_prefixes import SharedPrefixes
from tests.serving_world import World, drive, run_of
from tests.unit.shared_world import Mesh, engine_of, keys_of, prompt


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


class Rows:
    """Rows that went through each layer."""

    def __init__(self, backbone: LlamaBackbone, patch: pytest.MonkeyPatch) -> None:
        self.by_layer = [0] * backbone.n_layers
        self.logits: list[torch.Tensor] = []
        block, logits = backbone._block, backbone.logits

        def counted(index: int, rows: object, **more: object) -> None:
            self.by_layer[index] += len(rows.x)  # type: ignore[attr-defined]
            block(index, rows, **more)  # type: ignore[arg-type]

        def noted(rows: torch.Tensor, *more: object) -> torch.Tensor:
            self.logits.append(logits(rows, *more))
            return self.logits[-1]

        patch.setattr(backbone, "_block", counted)
        patch.setattr(backbone, "logits", noted)


@pytest.fixture
def rows(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rows]:
    yield Rows(world.backbone, monkeypatch)


def asked(text: str, adapter: str | None = None) -> dict[str, object]:
    return {"prompt": text, "adapter": adapter, "max_tokens": 6}


_PUBLISHED: dict[tuple[str, str | None], dict[bytes, Entry]] = {}


def read(world: World, mesh: Mesh, text: str, adapter: str | None = None) -> None:
    """An engine of another node has read ``text``."""
    if (text, adapter) not in _PUBLISHED:
        theirs = Mesh()
        drive(engine_of(world, theirs), {"a": asked(text, adapter)})
        _PUBLISHED[text, adapter] = theirs.entries
    mesh.entries |= _PUBLISHED[text, adapter]


def answer(events: list[Event]) -> str:
    (ended,) = (event for event in events if isinstance(event, Ended))
    return ended.text


def finish(engine: ModelEngine) -> list[Event]:
    events: list[Event] = []
    for _ in range(1000):
        if engine.due_s is None:
            return events
        events += engine.step()
    raise AssertionError("somebody waits for ever")


def fetched(engine: ModelEngine) -> int:
    assert engine.shared is not None
    return engine.shared.n_fetched_tokens


def test_what_a_peer_has_read_is_not_read_again_and_the_answer_is_the_same(world: World, rows: Rows) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text)
    engine = engine_of(world, mesh)
    rows.by_layer = [0] * 5
    ended = drive(engine, {"b": asked(text + "what?")})["b"]
    assert ended.text == world.alone(**asked(text + "what?")).text
    assert fetched(engine) == 384
    drive(engine, {"c": asked(text + "why?")})
    assert fetched(engine) == 384 and len(mesh.wanted) == 1  # it is here now


def test_logits_after_fetched_states_are_those_after_ones_own_to_the_last_bit(
    world: World, rows: Rows
) -> None:
    mesh, text = Mesh(), prompt(world, 2, 448)
    one = engine_of(world, mesh)
    drive(one, {"first": asked(text + "first")})
    rows.logits.clear()
    drive(one, {"own": asked(text + "second")})
    own, other = list(rows.logits), engine_of(world, mesh)
    rows.logits.clear()
    drive(other, {"fetched": asked(text + "second")})
    assert fetched(other) == 448
    assert len(own) == len(rows.logits)
    assert all(torch.equal(a, b) for a, b in zip(own, rows.logits, strict=True))


@pytest.mark.parametrize(
    ("by", "asks"),
    [
        *((None, asks) for asks in (None, "top", "middle", "whole", "activated")),
        *(("top", asks) for asks in (None, "top", "top-too", "middle")),
        *(("middle", asks) for asks in (None, "top", "middle", "whole")),
    ],
)
def test_below_the_cuts_nodes_share_and_above_them_they_do_not(
    world: World, rows: Rows, by: str | None, asks: str | None
) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text, by)
    engine = engine_of(world, mesh)
    rows.by_layer = [0] * 5
    ended = drive(engine, {"b": asked(text + "what?", asks)})["b"]
    went_through = list(rows.by_layer)
    assert ended.text == world.alone(**asked(text + "what?", asks)).text
    levels = {None: 5, "top": 3, "top-too": 3, "middle": 1, "whole": 0, "activated": 5}
    # An activated adapter that was not invoked is the plain model.
    level = min(levels[by], levels[asks])
    assert fetched(engine) == (384 if level else 0)
    n_suffix = 400 + 5 - 384 + 5
    assert went_through[:level] == [n_suffix] * level
    assert all(n == n_suffix + 384 for n in went_through[level:-1])


def test_an_adapters_states_are_never_published_above_its_first_layer(world: World) -> None:
    mesh, text, keys = Mesh(), prompt(world, 4, 300), keys_of(world)
    read(world, mesh, text, "middle")
    ids = world.tokens.plain(text)
    for group in keys.groups:
        published = [part.key in mesh.entries for part in keys.parts(group, ids)]
        assert published == [group.stop <= 2] * 4
    assert all(part.key in mesh.entries for part in keys.parts(1, ids))  # where ``middle`` goes on


@pytest.mark.parametrize("seed", range(6))
def test_what_is_damaged_or_gone_is_read_here_from_the_last_whole_block_on(world: World, seed: int) -> None:
    rng, adapter = random.Random(seed), (None, "top")[seed % 2]
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text, adapter)
    ids, keys = world.tokens.plain(text), keys_of(world)
    block = rng.randrange(6)
    part = keys.parts(rng.choice(keys.below(3)), ids)[block]
    if seed < 3:
        mesh.lost = {part.key}
    else:
        mesh.damage = lambda key, payload: payload[: len(payload) // 2] if key == part.key else payload
    mesh.per_wait = 1
    engine = engine_of(world, mesh)
    ended = drive(engine, {"b": asked(text + "what?", adapter)})["b"]
    assert ended.text == world.alone(**asked(text + "what?", adapter)).text
    assert fetched(engine) == 64 * block and not mesh.open


def test_the_first_layers_begin_while_the_last_are_on_their_way(world: World, rows: Rows) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text)
    engine, keys = engine_of(world, mesh), keys_of(world)
    mesh.per_wait, mesh.until = 1, 6  # the first group of six blocks
    assert engine.start(run_of("b", **asked(text + "what?"))) == []
    while not mesh.open or mesh.open[0].n_settled < 6:
        engine.step()
    rows.by_layer = [0] * 5
    come: list[int] = []
    block = world.backbone._block

    def look(index: int, *more: object, **and_more: object) -> None:
        come.append(mesh.open[0].n_settled if mesh.open else 18)
        block(index, *more, **and_more)  # type: ignore[arg-type]

    mesh.until = 18
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.backbone, "_block", look)
        engine.step()
    assert come == [6, 12, 12, 18, 18] and len(keys.groups) == 3
    finish(engine)
    assert fetched(engine) == 384


@pytest.mark.parametrize("adapter", [None, "top"])
@pytest.mark.parametrize("stops_after", [0, 6, 7, 13])
def test_what_stops_coming_is_read_here(
    world: World, monkeypatch: pytest.MonkeyPatch, stops_after: int, adapter: str | None
) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text, adapter)
    engine = engine_of(world, mesh)
    mesh.per_wait, mesh.until = 1, stops_after
    assert engine.start(run_of("b", **asked(text + "what?", adapter))) == []
    events: list[Event] = []
    for _ in range(60):  # it waits, and other messages are seen meanwhile
        events += engine.step()
    mesh.lost = set(mesh.entries)
    mesh.until = 1 << 30
    events += finish(engine)
    assert answer(events) == world.alone(**asked(text + "what?", adapter)).text
    assert not mesh.open


def test_others_steps_go_on_while_one_waits(world: World) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text)
    engine = engine_of(world, mesh)
    assert engine.start(run_of("busy", prompt="hello", max_tokens=50)) == []
    engine.step()
    mesh.per_wait = 0
    assert engine.start(run_of("b", **asked(text + "what?"))) == []
    n_written = sum(len(engine.step()) for _ in range(20))
    assert n_written == 20 and mesh.open[0].n_waits == 0  # nobody stood still
    mesh.until = 0
    engine.stop(Stop(task=TaskId("b"), attempt=1, reason="enough"))
    finish(engine)


@pytest.mark.parametrize("is_alone", [True, False])
def test_who_began_early_begins_anew_if_the_rest_is_lost(world: World, is_alone: bool) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text, "top")
    engine = engine_of(world, mesh)
    mesh.per_wait, mesh.until = 6, 6  # the rows that enter its cut
    events = engine.start(run_of("b", **asked(text + "what?", "top")))
    (attempt,) = engine._attempts.values()
    while attempt.sequences[0].reading is None:
        events += engine.step()
    assert not attempt.sequences[0].reading.is_whole and not attempt.sequences[0].reading.n_entering
    if not is_alone:
        events += engine.start(run_of("busy", prompt="hello", max_tokens=500))
    mesh.lost, mesh.until, mesh.per_wait = set(mesh.entries), 1 << 30, 1 << 30
    mesh.open[0].wait(1 << 30, 0)
    for _ in range(30):
        events += engine.step()
    assert answer(events) == world.alone(**asked(text + "what?", "top")).text
    engine.stop(Stop(task=TaskId("busy"), attempt=1, reason="enough"))
    finish(engine)
    assert fetched(engine) == 0 and not mesh.open


def test_who_begins_alike_waits_for_what_is_coming_and_finds_it(world: World) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text)
    engine = engine_of(world, mesh)
    mesh.per_wait = 1
    tasks = {f"t{i}": asked(text + str(i)) for i in range(3)}
    for task, ended in drive(engine, tasks).items():
        assert ended.text == world.alone(**tasks[task]).text
    assert len(mesh.wanted) == 1 and fetched(engine) == 384


@pytest.mark.parametrize("adapter", [None, "top"])
@pytest.mark.parametrize("n_come", [0, 6, 8, 12])
def test_cancelled_while_waiting_it_lets_go_of_everything(
    world: World, n_come: int, adapter: str | None
) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text, adapter)
    engine = engine_of(world, mesh)
    assert engine.prefixes is not None
    mesh.per_wait, mesh.until = 1, n_come
    assert engine.start(run_of("b", **asked(text + "what?", adapter))) == []
    for _ in range(n_come + 8):
        engine.step()
    assert len(engine.stop(Stop(task=TaskId("b"), attempt=1, reason="enough"))) == 1
    assert engine.due_s is None and not mesh.open
    assert len(engine.prefixes) == 0 and engine.prefixes.held_bytes == 0
    mesh.until = 1 << 30
    again = drive(engine, {"c": asked(text + "what?", adapter)})["c"]
    assert again.text == world.alone(**asked(text + "what?", adapter)).text


def test_paused_and_resumed_while_it_waits_it_is_as_if_nothing_had_been(world: World) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text)
    engine = engine_of(world, mesh)
    mesh.per_wait, mesh.until = 1, 8
    events = engine.start(run_of("b", **asked(text + "what?")))
    for _ in range(12):
        events += engine.step()
    engine.pause(Pause(task=TaskId("b"), attempt=1))
    for _ in range(5):
        events += engine.step()
    mesh.until = 1 << 30
    engine.resume(Resume(task=TaskId("b"), attempt=1))
    events += finish(engine)
    assert answer(events) == world.alone(**asked(text + "what?")).text


def test_short_prompts_are_not_asked_about_and_not_published_before_they_come_again(world: World) -> None:
    mesh, text = Mesh(), prompt(world, 12, 200)
    engine = engine_of(world, mesh)
    drive(engine, {"a": asked(text)})
    assert not mesh.entries
    drive(engine, {"b": asked(text + "again")})
    assert len(mesh.entries) == 3 * (3 + 2)  # whole blocks; groups, and rows where adapters begin


def test_what_would_take_longer_than_reading_is_read_here(world: World) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text)
    for expected_s in (10.0, None):
        mesh.expected_s = expected_s
        engine = engine_of(world, mesh)
        drive(engine, {"b": asked(text + "what?")})
        assert not mesh.wanted


def test_what_is_on_its_way_takes_half_of_the_memory_for_prefixes_at_most(world: World) -> None:
    mesh, text, other = Mesh(), prompt(world, 1, 400), prompt(world, 2, 400)
    read(world, mesh, text)
    read(world, mesh, other)
    for budget_bytes in (100_000, 1_000_000, 1_500_000, 3_000_000):
        mesh.wanted.clear()
        engine = engine_of(world, mesh)
        assert engine.prefixes is not None
        engine.prefixes.budget_bytes = budget_bytes
        drive(engine, {"a": asked(text + "what?"), "b": asked(other + "what?")})
        wanted_bytes = sum(mesh.entries[key].encoded.n_bytes for keys in mesh.wanted for key in keys)
        assert wanted_bytes <= budget_bytes // 2
        assert bool(mesh.wanted) == (budget_bytes > 100_000)


@pytest.mark.parametrize("name", ["backbone_digest", "tokenizer_digest"])
def test_states_of_another_model_are_never_found(world: World, name: str) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text)
    engine = engine_of(world, mesh, **{name: "another"})
    drive(engine, {"b": asked(text)})
    assert not mesh.wanted


def test_what_came_from_a_peer_is_not_published_again(world: World) -> None:
    mesh, text = Mesh(), prompt(world, 15, 384)
    read(world, mesh, text)
    engine = engine_of(world, mesh)
    drive(engine, {"b": asked(text + "what?")})
    assert engine.shared is not None and engine.shared.publisher is not None
    assert fetched(engine) == 384 and engine.shared.publisher.n_blocks == 0


@pytest.mark.parametrize("adapter", [None, "top"])
def test_what_comes_too_slowly_is_given_up_but_for_the_blocks_that_are_whole(
    world: World, monkeypatch: pytest.MonkeyPatch, adapter: str | None
) -> None:
    monkeypatch.setattr(arrivals_file, "_WINDOW_BLOCKS", 2)
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text, adapter)
    engine = engine_of(world, mesh)
    mesh.per_wait, mesh.until = 1, 7  # one window of two blocks in three parts each, and one part more
    events = engine.start(run_of("b", **asked(text + "what?", adapter)))
    for _ in range(10):
        events += engine.step()
    mesh.now += 10
    events += finish(engine)
    assert answer(events) == world.alone(**asked(text + "what?", adapter)).text
    assert fetched(engine) == 128 and not mesh.open


def test_a_link_that_seems_too_slow_is_tried_now_and_then(world: World) -> None:
    mesh, text = Mesh(), prompt(world, 1, 400)
    read(world, mesh, text)
    engine = engine_of(world, mesh)
    for n, now in ((1, 0.0), (1, 59.0), (2, 61.0)):
        mesh.now = now
        assert engine.shared is not None and engine.prefixes is not None
        engine.shared._costs.row_s = 1.0
        mesh.expected_s = 1000.0
        engine.prefixes.clear()
        drive(engine, {"b": asked(text + "what?")})
        assert len(mesh.wanted) == n


def test_through_a_disk_that_two_processes_share(world: World, tmp_path: Path) -> None:
    text = prompt(world, 18, 400)
    disks = [PrefixDisk(LocalStore(tmp_path, 0, 1 << 26)) for _ in range(2)]

    def engine(disk: PrefixDisk) -> ModelEngine:
        return world.engine(share=lambda p: SharedPrefixes(p, keys_of(world), [("disk", disk)], disk))

    drive(engine(disks[0]), {"a": asked(text)})
    disks[0].close()  # all is written
    assert len(list(tmp_path.glob("*.pack"))) == 1
    other = engine(disks[1])
    ended = drive(other, {"b": asked(text + "what?")})["b"]
    assert ended.text == world.alone(**asked(text + "what?")).text
    assert fetched(other) == 384
    disks[1].close()


def test_a_damaged_file_is_a_miss(world: World, tmp_path: Path) -> None:
    text = prompt(world, 19, 400)
    disk = PrefixDisk(LocalStore(tmp_path, 0, 1 << 26))
    engine = world.engine(share=lambda p: SharedPrefixes(p, keys_of(world), [("disk", disk)], disk))
    drive(engine, {"a": asked(text)})
    disk.close()
    (pack,) = tmp_path.glob("*.pack")
    content = bytearray(pack.read_bytes())
    content[-1000] ^= 1
    pack.write_bytes(content)
    disk = PrefixDisk(LocalStore(tmp_path, 0, 1 << 26))
    other = world.engine(share=lambda p: SharedPrefixes(p, keys_of(world), [("disk", disk)], disk))
    ended = drive(other, {"b": asked(text + "what?")})["b"]
    assert ended.text == world.alone(**asked(text + "what?")).text
    assert fetched(other) < 384
    disk.close()
