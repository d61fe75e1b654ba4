"""Which adapters a node pulls by itself."""

from __future__ import annotations

import pytest

from mesh.agreement.versions import Newest
from mesh.messages.files import AdapterHeld, AdapterRemoved
from node.files.distribution import SMALL_BYTES, Replicas, wanted
from node.files.library import Holdings

BASE = "b" * 64


def held(name: str = "spam", version: int = 2, size: int = 1000, base: str | None = BASE) -> AdapterHeld:
    return AdapterHeld(name=name, version=version, digest="5" * 64, manifest_bytes=9, bytes=size, base=base)


def pulled(one: AdapterHeld, here: Holdings | None = None, replicas: Replicas = "auto") -> bool:
    return wanted({one.name: Newest(one.version, one)}, here or Holdings(), BASE, replicas) == [one]


@pytest.mark.parametrize(
    ("replicas", "small", "large"), [("auto", True, False), ("all", True, True), ("demand", False, False)]
)
def test_size_and_setting_decide_what_comes_by_itself(replicas: Replicas, small: bool, large: bool) -> None:
    assert pulled(held(size=SMALL_BYTES), replicas=replicas) == small
    assert pulled(held(size=SMALL_BYTES + 1), replicas=replicas) == large


def test_a_newer_version_of_what_is_here_comes_whatever_its_size() -> None:
    newer = held(version=3, size=10 * SMALL_BYTES)
    assert pulled(newer, Holdings(shelf={"spam": held(version=2)}), "demand")
    assert not pulled(held(version=2), Holdings(shelf={"spam": held(version=2)}), "all")
    assert not pulled(held(version=1), Holdings(shelf={"spam": held(version=2)}), "all")


def test_only_adapters_of_the_backbone_that_is_served_here_come() -> None:
    assert pulled(held(base=None)) and not pulled(held(base="c" * 64))
    assert wanted({"spam": Newest(2, held())}, Holdings(), None, "all") == [], "nothing is served yet"


def test_what_was_removed_here_or_everywhere_does_not_come_and_a_newer_version_does() -> None:
    declined = Holdings(declined={"spam": 2})
    removed = Holdings(removed=(AdapterRemoved(name="spam", version=2, left_s=10.0),))
    for here in (declined, removed):
        assert not pulled(held(version=2), here, "all") and pulled(held(version=3), here)
    assert wanted({"spam": Newest(2, None)}, Holdings(), BASE, "all") == []


def test_small_ones_come_first() -> None:
    sizes = {"a": 30, "b": 10, "c": 20}
    newest = {name: Newest(2, held(name, size=size)) for name, size in sizes.items()}
    assert [one.name for one in wanted(newest, Holdings(), BASE, "auto")] == ["b", "c", "a"]
