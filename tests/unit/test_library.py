"""The adapters' directory: versions, removals, room, and what a hostile peer may not do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.agreement.versions import Newest
from mesh.ids import NodeId
from mesh.messages import FilesHeld
from mesh.messages.files import AdapterHeld
from mesh.wire import decode_json, encode_json
from node.files.file_list import ADAPTER_FILES, FileList
from node.files.library import AGE_EVERY_S, OLDER_KEPT_MAX, REMEMBERED_S, Holdings, Library
from tests.unit.adapters_made import put_adapter

BASE = "b" * 64


class Machine:
    """A library and its calendar."""

    def __init__(self, path: Path, quota_bytes: int = 10**9) -> None:
        self.at = 1_000_000.0
        self.shelf = path / "adapters"
        self.up_s = 9_000_000.0
        self.library = self.restarted(quota_bytes)

    def restarted(self, quota_bytes: int = 10**9) -> Library:
        self.library = Library(
            self.shelf, quota_bytes=quota_bytes, now=lambda: self.at, uptime=lambda: self.up_s
        )
        return self.library

    def look(self, newest: dict[str, Newest] | None = None) -> Holdings:
        self.at += 1
        return self.library.look(newest or {}, BASE)

    def make(self, name: str, weights: bytes) -> AdapterHeld:
        put_adapter(self.shelf, name, weights=weights)
        return self.look().shelf[name]

    def receive(
        self, held: AdapterHeld, source: Machine, *, is_wanted: bool = False, **more: object
    ) -> str | None:
        """As a pull does, without a network."""
        self.at += 1
        partial = self.library.partial()
        for path in (source.library.home / "versions" / held.digest).iterdir():
            shutil.copy(path, partial)
        files = FileList.of(partial.iterdir())
        assert files.blob.digest.hex() == held.digest
        return self.library.install(held, files, partial, is_wanted=is_wanted, **more)  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "there")


def newest_of(held: AdapterHeld) -> dict[str, Newest]:
    return {held.name: Newest(held.version, held)}


def removed(name: str, version: int, left_s: float = REMEMBERED_S) -> dict[str, Newest]:
    return {name: Newest(version, None, left_s)}


def test_what_appears_is_version_one_and_what_replaces_it_is_the_next(here: Machine) -> None:
    first = here.make("spam", b"1")
    assert (first.version, first.is_own, first.base) == (1, True, BASE)
    assert here.look().shelf["spam"] == first, "the same files are the same version"
    second = here.make("spam", b"2")
    assert second.version == 2 and second.digest != first.digest
    again = here.make("spam", b"1")
    assert (again.version, again.digest) == (3, first.digest), "an old one put back is the newest again"


def test_a_new_version_counts_on_from_what_the_mesh_knows(here: Machine) -> None:
    put_adapter(here.shelf, "spam")
    elsewhere = AdapterHeld(name="spam", version=7, digest="e" * 64, manifest_bytes=1, bytes=1)
    assert here.look(newest_of(elsewhere)).shelf["spam"].version == 8


def test_versions_outlive_the_process(here: Machine) -> None:
    held = here.make("spam", b"1")
    again = here.restarted()
    assert again.look({}, BASE).shelf["spam"] == held


def test_a_damaged_index_is_given_up_and_adapters_stay(here: Machine) -> None:
    here.make("spam", b"1")
    (here.library.home / "index.json").write_text('{"form": 1, "shelf": 3}')
    assert Library(here.shelf).look({}, BASE).shelf["spam"].version == 1


@pytest.mark.parametrize(
    "card",
    [
        {"method": "é" * 64, "task": "\ud800", "digest": "\x1b[31m", "metric": float("nan")},
        {"method": "x" * 1000, "first_layer": 2**62, "metric": float("inf"), "backbone_sha256": "€" * 64},
        {"method": 3},
    ],
)
def test_a_card_from_anywhere_does_not_stop_the_node_and_is_not_passed_on(
    here: Machine, card: dict[str, object]
) -> None:
    usual = {"name": "x", "digest": "d", "method": "lora", "task": "t", "first_layer": 1, "top_layers": 1}
    put_adapter(here.shelf, "odd", card=usual | card)
    held = here.look().shelf["odd"]
    assert (held.metric, held.base) == (None, BASE) and held.method in ("", "lora")
    assert decode_json(encode_json(FilesHeld(node=NodeId("a"), incarnation=1, adapters=[held])), FilesHeld)


def test_versions_that_a_given_up_index_knew_are_swept_away(here: Machine) -> None:
    first = here.make("spam", b"1")
    here.make("spam", b"2")
    (here.library.home / "index.json").unlink()
    again = here.restarted()
    again.look({}, BASE)
    again.sweep()
    assert [path.name for path in (here.library.home / "versions").iterdir()] != []
    assert not again.version_path(first.digest).exists() and (here.shelf / "spam").exists()


def test_an_index_damaged_within_costs_that_version_only(here: Machine) -> None:
    here.make("spam", b"1")
    here.make("tone", b"2")
    path = here.library.home / "index.json"
    index = json.loads(path.read_text())
    index["kept"][0]["files"] = "nonsense"
    path.write_text(json.dumps(index))
    again = Library(here.shelf, quota_bytes=10**9)
    assert set(again.look({}, BASE).shelf) == {"spam", "tone"}
    digest = index["kept"][0]["held"]["digest"]
    assert bytes.fromhex(digest) not in again.look({}, BASE).blobs and again.own_copy(digest) is None


def test_a_directory_that_is_still_being_written_is_no_version_yet(here: Machine) -> None:
    half = here.shelf / "half"
    half.mkdir(parents=True)
    (half / "adapter_config.json").write_text("{}")
    assert here.look().adapters == ()


def test_names_that_could_leave_the_directory_are_not_distributed(here: Machine) -> None:
    for name in ("Upper", "with.dot"):
        put_adapter(here.shelf, name)
    assert here.look().adapters == ()


def test_what_is_given_to_peers_is_what_was_hashed(here: Machine) -> None:
    held = here.make("spam", b"1")
    content = (here.shelf / "spam" / "adapter_model.safetensors").read_bytes()
    blobs = here.look().blobs
    files = FileList.parse(blobs[bytes.fromhex(held.digest)], ADAPTER_FILES.__contains__)  # type: ignore[arg-type]
    here.make("spam", b"2")
    blobs = here.look().blobs
    for file in files.files:
        path = blobs[file.digest]
        assert isinstance(path, Path)
        if file.name == "adapter_model.safetensors":
            assert path.read_bytes() == content, "the older version is kept, whatever lies on the shelf now"


def test_older_versions_are_kept_to_a_bound(here: Machine) -> None:
    for k in range(6):
        here.make("spam", str(k).encode())
    versions = [held.version for held in here.look().adapters]
    assert versions[0] == 6 and sorted(versions[1:]) == [5 - k for k in range(OLDER_KEPT_MAX)][::-1]
    assert len(list((here.library.home / "versions").iterdir())) == 1 + OLDER_KEPT_MAX


def test_a_pulled_adapter_is_served_and_the_same_version_everywhere(here: Machine, there: Machine) -> None:
    held = there.make("spam", b"1")
    assert here.receive(held, there) is None
    mine = here.look().shelf["spam"]
    assert (mine.version, mine.digest, mine.is_own) == (held.version, held.digest, False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (here.shelf / "spam" / name).read_bytes() == (there.shelf / "spam" / name).read_bytes()


def test_an_older_version_never_replaces_a_newer_one(here: Machine, there: Machine) -> None:
    held = there.make("spam", b"old")
    here.make("spam", b"1")
    mine = here.make("spam", b"2")
    assert here.receive(held, there) is None
    assert here.look().shelf["spam"] == mine


def test_what_was_put_there_an_instant_ago_is_not_overwritten(here: Machine, there: Machine) -> None:
    here.make("spam", b"1")
    newer = replace(there.make("spam", b"2"), version=2)
    put_adapter(here.shelf, "spam", weights=b"mine")
    assert "look at it comes first" in str(here.receive(newer, there))
    assert here.look().shelf["spam"].version == 2, "a version of its own, and the digests decide"


def test_a_removal_takes_the_versions_it_knew_and_no_later_one(here: Machine) -> None:
    here.make("spam", b"1")
    assert here.look(removed("spam", 1)).shelf == {}
    assert not (here.shelf / "spam").exists()
    back = here.make("spam", b"2")
    assert back.version == 2
    assert here.look(removed("spam", 1)).shelf["spam"] == back, "made after it was removed"


def test_a_removal_does_not_take_what_was_put_there_since(here: Machine) -> None:
    here.make("spam", b"1")
    put_adapter(here.shelf, "spam", weights=b"2")
    here.library.remove("spam", 1)
    assert here.look().shelf["spam"].version == 2


def test_a_removal_is_repeated_until_it_is_forgotten(here: Machine) -> None:
    here.make("spam", b"1")
    here.library.remove("spam", 1)
    (one,) = here.look().removed
    assert (one.name, one.version) == ("spam", 1) and one.left_s == pytest.approx(REMEMBERED_S, abs=5)
    here.up_s += REMEMBERED_S - 100
    here.restarted()
    (one,) = here.look().removed
    assert one.left_s <= 100, "time passes while nobody looks, and while the process is away"
    here.look(removed("spam", 1))
    assert here.look().removed[0].left_s <= 100, "who says it again does not make it live longer"
    here.up_s += AGE_EVERY_S
    assert here.look().removed == ()


def test_the_date_and_a_boot_forget_no_removal(here: Machine) -> None:
    here.library.remove("spam", 1)
    here.at += 100 * REMEMBERED_S  # a device without a battery has heard what day it is
    assert here.look().removed[0].left_s == REMEMBERED_S
    here.up_s = 5.0
    here.restarted()
    assert here.look().removed[0].left_s == REMEMBERED_S


def test_a_removed_adapter_does_not_come_back_by_a_pull_that_was_under_way(
    here: Machine, there: Machine
) -> None:
    held = there.make("spam", b"1")
    here.library.remove("spam", held.version)
    assert here.receive(held, there) == "it was removed meanwhile"
    assert here.look().shelf == {} and not (here.shelf / "spam").exists()


def test_removing_by_hand_is_for_this_machine_and_this_version(here: Machine, there: Machine) -> None:
    held = there.make("spam", b"1")
    here.receive(held, there)
    here.look()
    shutil.rmtree(here.shelf / "spam")
    assert here.look().declined == {}, "a directory that is being replaced is not there for an instant"
    assert here.look().declined == {"spam": 1}
    assert here.look().removed == ()
    assert here.make("spam", b"2").version == 2


def test_the_quota_holds_for_what_was_pulled_and_own_adapters_never_leave(
    here: Machine, there: Machine
) -> None:
    held = [there.make(f"a{k}", bytes([k]) * 100) for k in range(5)]
    size = held[0].bytes
    mine = Machine(here.shelf.parent / "small", quota_bytes=3 * size)
    mine.make("own", bytes(100))
    assert [mine.receive(one, there) for one in held[:3]] == [None] * 3
    assert not mine.library.has_room(size)
    assert "adapter_disk" in str(mine.receive(held[3], there)), "nothing leaves for what nobody asked for"
    mine.at += 1
    mine.library.used("a0")
    mine.look()
    assert mine.receive(held[3], there, is_wanted=True) is None
    assert set(mine.look().shelf) == {"own", "a0", "a2", "a3"}, "the one unused for longest has left"
    assert mine.receive(held[4], there, is_wanted=True, only_here={held[2].digest}) is None
    assert set(mine.look().shelf) == {"own", "a2", "a3", "a4"}, "not what nobody else has"
