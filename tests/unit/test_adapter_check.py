"""What `edgemesh adapters push` lets in: an adapter that fits the backbone, with a card that says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import peft
import pytest

from mesh.errors import ConfigError
from node.compute.adapters.check import card_of, main
from tests.reference.made_adapters import N_LAYERS, make_adapter, make_model

SHA256 = "c" * 64
CONFIG = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], layers_to_transform=[3, 4])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


def test_an_adapter_from_elsewhere_gets_a_card(model: Path, tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a", model, CONFIG)
    card = card_of(directory, model, SHA256, "mine")
    assert (card.name, card.method, card.task, card.backbone_sha256) == ("mine", "lora", "generate", SHA256)
    assert (card.first_layer, card.top_layers) == (3, N_LAYERS - 3)


def test_one_for_another_backbone_is_refused_in_words(model: Path, tmp_path: Path) -> None:
    directory = make_adapter(tmp_path / "a", model, CONFIG)
    other = make_model(tmp_path / "other", family="qwen2")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 128, "num_attention_heads": 8}))
    with pytest.raises(ConfigError, match="another backbone"):
        card_of(directory, other, SHA256, "mine")


def test_the_command_says_on_stderr_what_is_wrong_and_ends_with_two(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(tmp_path), str(model), SHA256, "mine"]
    monkeypatch.setattr(sys, "argv", ["check", *arguments])
    assert main() == 2
    told = capsys.readouterr()
    assert told.out == "" and "adapter_config.json" in told.err
    make_adapter(tmp_path, model, CONFIG)
    assert main() == 0
    assert json.loads(capsys.readouterr().out)["name"] == "mine"
