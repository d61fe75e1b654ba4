"""The shelf: names, loading, replacing, pins and the budget of bytes."""

from __future__ import annotations

import gc
import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh.errors import ConfigError
from node.compute.adapters.card import Card, digest_of, write_card
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.shelf import Shelf
from tests.reference.made_adapters import make_adapter, make_model

CONFIG = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> BackboneFacts:
    return BackboneFacts.of(make_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def made(facts: BackboneFacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("made") / "one", facts.directory, CONFIG)


@pytest.fixture
def shelf_dir(made: Path, tmp_path: Path) -> Path:
    for name in ("a", "b", "c", "d"):
        shutil.copytree(made, tmp_path / "shelf" / name)
    return tmp_path / "shelf"


def size_of(made: Path) -> int:
    return 4 * sum(t.numel() for t in load_file(made / "adapter_model.safetensors").values())


def replace(directory: Path, factor: float) -> None:
    """Another version moved over the old one, as tuning does it."""
    draft = directory.parent / f".{directory.name}.new"
    shutil.copytree(directory, draft)
    weights = {k: v * factor for k, v in load_file(draft / "adapter_model.safetensors").items()}
    save_file(weights, draft / "new")
    os.replace(draft / "new", draft / "adapter_model.safetensors")
    shutil.rmtree(directory)
    draft.rename(directory)


class TestNames:
    def test_lists_what_holds_an_adapter_and_says_when_that_changes(
        self, shelf_dir: Path, facts: BackboneFacts
    ) -> None:
        (shelf_dir / "notes").mkdir()
        (shelf_dir / ".draft").mkdir()
        shelf = Shelf(shelf_dir, facts, 1 << 30)
        assert shelf.names() == ["a", "b", "c", "d"]
        assert not shelf.refresh()
        shutil.rmtree(shelf_dir / "b")
        assert shelf.refresh() and shelf.names() == ["a", "c", "d"]

    def test_a_directory_that_is_not_there_is_an_empty_shelf(
        self, tmp_path: Path, facts: BackboneFacts
    ) -> None:
        assert Shelf(tmp_path / "none", facts, 1 << 30).names() == []

    @pytest.mark.parametrize("name", ["poet", "../a", "", "a/../b", ".a", "a" * 300, "a\0"])
    def test_an_unknown_or_hostile_name_is_told_what_there_is(
        self, shelf_dir: Path, facts: BackboneFacts, name: str
    ) -> None:
        with pytest.raises(ConfigError, match="a, b, c, d"):
            Shelf(shelf_dir, facts, 1 << 30).get(name)

    def test_a_card_is_shown_as_tuning_wrote_it_and_made_up_otherwise(
        self, shelf_dir: Path, facts: BackboneFacts
    ) -> None:
        digest = digest_of(shelf_dir / "a")
        card = Card(name="a", digest=digest, method="lora", task="chat", first_layer=0, top_layers=5)
        write_card(shelf_dir / "a", card)
        shelf = Shelf(shelf_dir, facts, 1 << 30)
        assert shelf.card("a") == card.listing()
        other = shelf.card("b")
        assert (other.name, other.digest, other.first_layer, other.top_layers) == ("b", digest, 0, 5)


class TestReplacing:
    def test_a_new_version_is_served_and_the_old_object_stays_as_it_was(
        self, shelf_dir: Path, facts: BackboneFacts
    ) -> None:
        shelf = Shelf(shelf_dir, facts, 1 << 30)
        old = shelf.pin("a")
        before = old.deltas[0, "qkv"].ups[0].b.clone()
        replace(shelf_dir / "a", 2.0)
        new = shelf.get("a")
        assert new is not old and new.digest != old.digest
        assert torch.equal(old.deltas[0, "qkv"].ups[0].b, before)
        assert shelf.get("a") is new

    def test_an_old_version_counts_until_its_last_sequence_ends(
        self, shelf_dir: Path, facts: BackboneFacts
    ) -> None:
        shelf = Shelf(shelf_dir, facts, 1 << 30)
        old = shelf.pin("a")
        replace(shelf_dir / "a", 2.0)
        assert shelf.refresh()
        new = shelf.pin("a")
        assert shelf.held_bytes == old.n_bytes + new.n_bytes
        shelf.unpin(old)
        assert shelf.held_bytes == new.n_bytes

    def test_removing_the_directory_takes_the_name_and_the_memory(
        self, shelf_dir: Path, facts: BackboneFacts
    ) -> None:
        shelf = Shelf(shelf_dir, facts, 1 << 30)
        shelf.get("a")
        shutil.rmtree(shelf_dir / "a")
        shelf.refresh()
        assert shelf.held_bytes == 0
        with pytest.raises(ConfigError):
            shelf.get("a")


class TestBudget:
    def test_the_least_recently_used_leaves_first(
        self, shelf_dir: Path, facts: BackboneFacts, made: Path
    ) -> None:
        shelf = Shelf(shelf_dir, facts, 3 * size_of(made))
        for name in ("a", "b", "c", "a", "d"):
            shelf.get(name)
        assert shelf.loaded() == ["c", "a", "d"]

    def test_what_is_pinned_stays(self, shelf_dir: Path, facts: BackboneFacts, made: Path) -> None:
        shelf = Shelf(shelf_dir, facts, 2 * size_of(made))
        kept = shelf.pin("a")
        for name in ("b", "c", "d"):
            shelf.get(name)
        assert shelf.loaded() == ["a", "d"] and shelf.get("a") is kept
        shelf.unpin("a")
        for name in ("b", "c"):
            shelf.get(name)
        assert "a" not in shelf.loaded()

    def test_no_room_beside_those_in_use_is_refused_and_drops_none_of_them(
        self, shelf_dir: Path, facts: BackboneFacts, made: Path
    ) -> None:
        shelf = Shelf(shelf_dir, facts, 2 * size_of(made))
        shelf.pin("a"), shelf.pin("b")
        with pytest.raises(ConfigError, match="no room for adapter 'c'"):
            shelf.get("c")
        assert shelf.loaded() == ["a", "b"]

    def test_an_adapter_larger_than_the_budget_is_refused_with_the_numbers(
        self, shelf_dir: Path, facts: BackboneFacts
    ) -> None:
        """Before it is loaded: its file could not even be read."""
        with pytest.raises(ConfigError, match=r"takes 0\.0 MB.*all adapters together may take 0\.0 MB"):
            Shelf(shelf_dir, facts, 1000).get("a")

    def test_memory_grows_by_adapter_bytes_only(
        self, shelf_dir: Path, facts: BackboneFacts, made: Path
    ) -> None:
        def tensors_bytes() -> int:
            gc.collect()
            tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
            # Packed weights of other tests' models are opaque; an adapter's tensors are plain.
            return sum(t.untyped_storage().nbytes() for t in tensors if t.layout is torch.strided)

        shelf = Shelf(shelf_dir, facts, 1 << 30)
        shelf.get("a")
        before = tensors_bytes()
        for name in ("b", "c", "d"):
            shelf.get(name)
        assert tensors_bytes() - before == 3 * size_of(made) == 3 * shelf.get("a").n_bytes

    def test_a_refused_adapter_leaves_the_others_served(self, shelf_dir: Path, facts: BackboneFacts) -> None:
        config = json.loads((shelf_dir / "b" / "adapter_config.json").read_text())
        config["peft_type"] = "PREFIX_TUNING"
        (shelf_dir / "b" / "adapter_config.json").write_text(json.dumps(config))
        shelf = Shelf(shelf_dir, facts, 1 << 30)
        kept = shelf.get("a")
        with pytest.raises(ConfigError, match="PREFIX_TUNING"):
            shelf.get("b")
        assert shelf.get("a") is kept
