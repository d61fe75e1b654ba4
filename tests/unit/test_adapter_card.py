"""Digests and cards: what identifies an adapter, and what a hostile or damaged file may not do."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mesh.errors import ConfigError
from node.compute.adapters.card import Card, digest_of, read_card, write_card
from node.compute.adapters.tensors import read_header

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "/home/somebody/model",
}
CARD = Card(
    name="mail",
    digest="00" * 32,
    method="lora",
    task="classify",
    first_layer=2,
    top_layers=4,
    labels=("spam", "ham"),
    metric=0.93,
    bytes=1234,
)


def adapter(directory: Path, config: dict[str, Any] = CONFIG, **tensors: torch.Tensor) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        tensors or {"a": torch.ones(2, 3), "b": torch.zeros(4)}, directory / "adapter_model.safetensors"
    )
    return directory


class TestDigest:
    def test_where_it_was_made_and_the_order_of_sets_do_not_matter(self, tmp_path: Path) -> None:
        turned = {
            **CONFIG,
            "base_model_name_or_path": "other",
            "target_modules": CONFIG["target_modules"][::-1],
        }
        assert digest_of(adapter(tmp_path / "a")) == digest_of(adapter(tmp_path / "b", turned))

    @pytest.mark.parametrize(
        "other",
        [
            {"a": torch.ones(2, 3), "b": torch.tensor([0.0, 0, 0, -0.0])},  # one bit
            {"a": torch.ones(3, 2), "b": torch.zeros(4)},  # a shape
            {"a": torch.ones(2, 3), "c": torch.zeros(4)},  # a name
            {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.int32)},  # a type
        ],
    )
    def test_every_bit_name_shape_and_type_counts(
        self, tmp_path: Path, other: dict[str, torch.Tensor]
    ) -> None:
        assert digest_of(adapter(tmp_path / "a")) != digest_of(adapter(tmp_path / "b", **other))

    def test_the_configuration_counts(self, tmp_path: Path) -> None:
        assert digest_of(adapter(tmp_path / "a")) != digest_of(adapter(tmp_path / "b", {**CONFIG, "r": 8}))

    def test_writing_a_card_leaves_it_as_it_is(self, tmp_path: Path) -> None:
        before = digest_of(adapter(tmp_path / "a"))
        write_card(tmp_path / "a", CARD)
        assert digest_of(tmp_path / "a") == before and len(before) == 64


class TestCard:
    def test_comes_back_as_it_was_written(self, tmp_path: Path) -> None:
        write_card(tmp_path, CARD)
        assert read_card(tmp_path) == CARD
        assert [path.name for path in tmp_path.iterdir()] == ["edgemesh.json"], "no draft stays behind"

    def test_an_adapter_made_elsewhere_has_none(self, tmp_path: Path) -> None:
        assert read_card(tmp_path) is None

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "[]",
            "{}",
            '{"name": 1}',
            "[" * 100_000,
            " " * 5_000_000,
            json.dumps({**asdict(CARD), "labels": [1]}),
        ],
    )
    def test_a_damaged_one_is_refused_with_its_path(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "edgemesh.json").write_text(content)
        with pytest.raises(ConfigError, match=r"edgemesh\.json"):
            read_card(tmp_path)


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class TestHeader:
    def test_agrees_with_safetensors_itself(self, tmp_path: Path) -> None:
        adapter(tmp_path, CONFIG, x=torch.zeros(3, 5, dtype=torch.bfloat16), y=torch.zeros(()))
        header = read_header(tmp_path / "adapter_model.safetensors")
        assert {name: (t.dtype, t.shape, t.n_bytes) for name, t in header.items()} == {
            "x": ("BF16", (3, 5), 30),
            "y": ("F32", (), 4),
        }

    @pytest.mark.parametrize(
        "header",
        [
            {"a": entry(shape=(3,))},  # needs more bytes than it names
            {"a": entry(offsets=(0, 4096), shape=(1024,))},  # lies outside the file
            {"a": entry(offsets=(8, 0))},
            {"a": entry(offsets=(-8, 0))},
            {"a": entry(shape=(1 << 40, 1 << 40))},
            {"a": entry(shape=(True, 2))},
            {"a": entry(shape=(1,) * 40)},
            {"a": entry(dtype="F8_E4M3")},
            {"a": entry(), "b": entry()},  # overlap
            {"a": 7},
            {"a" * 1000: entry()},
            [],
        ],
    )
    def test_a_header_that_promises_what_is_not_there_is_refused(self, tmp_path: Path, header: Any) -> None:
        text = json.dumps(header).encode()
        (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
        with pytest.raises(ConfigError, match="is damaged"):
            read_header(tmp_path / "w")

    @pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, struct.pack("<Q", 4) + b"{no}"])
    def test_a_file_that_is_none_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "w").write_bytes(content)
        with pytest.raises(ConfigError, match="is damaged"):
            read_header(tmp_path / "w")

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="cannot read"):
            read_header(tmp_path / "w")
