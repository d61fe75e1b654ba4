"""Which weight format is loaded, why, and what the operator is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mesh.errors import ConfigError
from node.compute.backbone.load import load_backbone
from node.compute.backbone.precision import (
    AROUND_BYTES,
    PRECISIONS,
    SPEEDS,
    Choice,
    Speed,
    choose_precision,
    format_bytes,
    read_speeds,
    write_speeds,
)
from node.compute.backbone.speed import measure_speeds, measured_speeds

SIZES = {
    "fp32": 538_000_000,
    "bf16": 269_000_000,
    "fp16": 269_000_000,
    "int8": 136_000_000,
    "int4": 95_000_000,
}
PLENTY = 8_000_000_000


def speeds(**decode_tok_s: float) -> dict[str, Speed]:
    return {name: Speed(value, 10 * value) for name, value in decode_tok_s.items()}


def chosen(
    free_bytes: int = PLENTY, pinned: str | None = None, pressure: float = 0.0, **decode: float
) -> Choice:
    return choose_precision(free_bytes, SIZES, speeds(**decode), pinned, pressure)


def test_without_a_measurement_the_most_exact_format_that_fits_is_taken() -> None:
    choice = chosen()
    assert choice.precision == "fp32" and "not measured" in choice.reason
    assert chosen(AROUND_BYTES + 300_000_000).precision == "bf16"
    assert chosen(AROUND_BYTES + 150_000_000).precision == "int8"
    assert chosen(AROUND_BYTES + 100_000_000).precision == "int4"


def test_a_faster_format_is_taken_where_it_is_faster_by_enough() -> None:
    choice = chosen(fp32=40, bf16=35, fp16=35, int8=90, int4=60)
    assert choice.precision == "int8" and "2.2 times as fast" in choice.reason
    assert chosen(fp32=40, bf16=35, fp16=35, int8=48, int4=49).precision == "fp32"


def test_a_pressing_deadline_makes_less_worth_it() -> None:
    decode = {"fp32": 40.0, "bf16": 35.0, "fp16": 35.0, "int8": 44.0, "int4": 43.0}
    assert chosen(**decode).precision == "fp32"
    choice = chosen(pressure=1.0, **decode)
    assert choice.precision == "int8" and "deadline" in choice.reason


def test_a_step_down_must_be_worth_it_against_what_is_taken_already() -> None:
    assert chosen(fp32=40, bf16=60, fp16=60, int8=70, int4=80).precision == "int4"
    assert chosen(fp32=40, bf16=60, fp16=60, int8=70, int4=74).precision == "bf16"


def test_what_is_pinned_is_taken_even_if_slow() -> None:
    assert chosen(pinned="int4", fp32=90, int4=5).precision == "int4"


@pytest.mark.parametrize(
    ("pinned", "free_bytes", "words"),
    [
        ("fp32", 900_000_000, ("fp32", "1.06 GiB", "858 MiB", "bf16 would fit")),
        (None, 100_000_000, ("even int4", "663 MiB", "95.4 MiB", "smaller model")),
        ("int4", 100_000_000, ("int4", "663 MiB", "95.4 MiB", "smaller model")),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    pinned: str | None, free_bytes: int, words: tuple[str, ...]
) -> None:
    choice = chosen(free_bytes, pinned)
    assert choice.precision is None
    assert all(word in choice.reason for word in words), choice.reason


def test_the_table_says_of_every_format_what_it_needs_and_whether_it_fits() -> None:
    table = chosen(AROUND_BYTES + 140_000_000, int8=90).table
    assert [row.precision for row in table] == list(PRECISIONS)
    assert [row.fits for row in table] == [False, False, False, True, True]
    assert table[3].needs_bytes == SIZES["int8"] + AROUND_BYTES and table[3].speed == Speed(90, 900)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(2)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=211, max_position_embeddings=128,
        tie_word_embeddings=request.param,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bytes_foretold_are_the_bytes_held(model: Path, precision: str) -> None:
    foretold = format_bytes(model)[precision]
    assert load_backbone(model, "cpu", precision).held_bytes == pytest.approx(foretold, rel=0.02)


def test_what_was_measured_is_found_again_until_the_machine_is_another(tmp_path: Path) -> None:
    assert read_speeds(tmp_path) == {}
    write_speeds(tmp_path, speeds(fp32=40, int8=90))
    assert read_speeds(tmp_path) == speeds(fp32=40, int8=90)
    stored = json.loads((tmp_path / SPEEDS).read_text())
    stored["machine"] = "another"
    (tmp_path / SPEEDS).write_text(json.dumps(stored))
    assert read_speeds(tmp_path) == {}
    (tmp_path / SPEEDS).write_text("{")
    assert read_speeds(tmp_path) == {}


def test_every_format_is_measured_at_the_shapes_of_the_model(model: Path) -> None:
    found = measure_speeds(model, tries=1)
    assert tuple(found) == PRECISIONS
    assert all(speed.decode_tok_s > 0 and speed.prefill_tok_s > 0 for speed in found.values())


def test_an_architecture_without_8_bit_weights_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match=r"gpt2.*int8.*--precision fp32"):
        load_backbone(tmp_path, "cpu", "int8")


def test_a_request_is_prompt_and_answer_so_slow_reading_counts() -> None:
    quick_to_write = {"fp32": Speed(40, 900), "int4": Speed(60, 20)}
    assert choose_precision(PLENTY, SIZES, quick_to_write).precision == "fp32"


def test_of_a_model_that_answers_at_once_the_exact_format_is_taken() -> None:
    assert chosen(fp32=4000, int8=9000).precision == "fp32"


def test_speeds_are_measured_once_and_kept_but_not_on_a_busy_machine(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (50.0, 50.0, 50.0))
    assert measured_speeds(model, tmp_path) == {} == read_speeds(tmp_path)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    first = measured_speeds(model, tmp_path)
    assert measured_speeds(model, tmp_path) == first == read_speeds(tmp_path)
