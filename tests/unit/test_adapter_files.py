"""What is refused, by name, before it costs anything: kinds, fields, shapes, sizes and hostile files."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from mesh.errors import ConfigError
from node.compute.adapters.card import Card, digest_of, write_card
from node.compute.adapters.facts import BackboneFacts
from node.compute.adapters.files import load_adapter
from tests.reference.made_adapters import N_LAYERS, make_adapter, make_model

Tensors = dict[str, torch.Tensor]
TREE = "base_model.model.model."
Q = TREE + "layers.3.self_attn.q_proj."


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> BackboneFacts:
    return BackboneFacts.of(make_model(tmp_path_factory.mktemp("model")), sha256="11" * 32)


@pytest.fixture(scope="module")
def made(facts: BackboneFacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[3, 4]
    )
    return make_adapter(tmp_path_factory.mktemp("made") / "one", facts.directory, config)


@pytest.fixture
def change(made: Path, tmp_path: Path) -> Callable[..., Path]:
    def written(tensors: Callable[[Tensors], Tensors] = lambda found: found, **fields: Any) -> Path:
        config = {**json.loads((made / "adapter_config.json").read_text()), **fields}
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        save_file(
            tensors(load_file(made / "adapter_model.safetensors")), tmp_path / "adapter_model.safetensors"
        )
        return tmp_path

    return written


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda found: {**found, name: tensor}


class TestRefusedByName:
    @pytest.mark.parametrize(
        "method",
        [
            "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CPT", "ADAPTION_PROMPT",
            "POLY", "XLORA", "TRAINABLE_TOKENS", "BONE", "FUTURE_METHOD", None, 7,
        ],
    )  # fmt: skip
    def test_methods(self, method: Any, change: Callable[..., Path], facts: BackboneFacts) -> None:
        with pytest.raises(ConfigError, match=f"{method} adapters are not served: .*served are lora"):
            load_adapter(change(peft_type=method), facts)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("trainable_token_indices", [1, 2]),
            ("layer_replication", [[0, 3]]),
            ("target_parameters", ["x"]),
            ("use_qalora", True),
            ("arrow_config", {"top_k": 2}),
            ("megatron_config", {"a": 1}),
            ("init_lora_weights", "pissa_niter_4"),
            ("init_lora_weights", "olora"),
            ("task_type", "TOKEN_CLS"),
            ("alora_invocation_tokens", [99_999]),
            ("alora_invocation_tokens", []),
            ("alora_invocation_tokens", "abc"),
            ("lora_alpha", "many"),
            ("alpha_pattern", {"(q_)+proj": 3}),
            ("alpha_pattern", {".*.*.*.*q": 3}),
            ("alpha_pattern", {"q[": 3}),
            ("rank_pattern", [1]),
        ],
    )
    def test_fields(self, field: str, value: Any, change: Callable[..., Path], facts: BackboneFacts) -> None:
        started = time.monotonic()
        with pytest.raises(ConfigError, match=field):
            load_adapter(change(**{field: value}), facts)
        assert time.monotonic() - started < 5

    @pytest.mark.parametrize(
        ("tensor", "word"),
        [
            ((TREE + "embed_tokens.weight", torch.ones(211, 64)), "trained embeddings"),
            ((TREE + "embed_tokens.lora_embedding_A", torch.ones(4, 211)), "trained embeddings"),
            ((Q + "lora_C.weight", torch.ones(4)), "is nothing LORA has"),
            ((TREE + "layers.3.conv.weight", torch.ones(4)), "conv.weight"),
            ((TREE + "layers.3.input_layernorm.bias", torch.ones(64)), "nothing a norm has"),
            ((TREE + "layers.5.self_attn.q_proj.lora_A.weight", torch.ones(4, 64)), "has 5 layers"),
            ((Q + "lora_A.weight", torch.ones(4, 2048)), r"made for another backbone.*2048.*\(4, 64\)"),
            ((Q + "lora_B.weight", torch.ones(64, 5)), r"lora_B.*\(64, 4\)"),
            ((Q + "lora_A.weight", torch.full((4, 64), float("nan"))), "not finite"),
            (("base_model.model.score.weight", torch.ones(3, 9)), "score.weight"),
            (("base_model.model.score.bias", torch.ones(3)), "score"),
            ((Q + "base_layer.lora_A.weight", torch.ones(4, 64)), "two tensors"),
        ],
    )  # fmt: skip
    def test_tensors(
        self, tensor: tuple[str, torch.Tensor], word: str, change: Callable[..., Path], facts: BackboneFacts
    ) -> None:
        with pytest.raises(ConfigError, match=word):
            load_adapter(change(with_tensor(*tensor)), facts)

    def test_one_half_of_a_pair(self, change: Callable[..., Path], facts: BackboneFacts) -> None:
        directory = change(lambda found: {k: v for k, v in found.items() if k != Q + "lora_B.weight"})
        with pytest.raises(ConfigError, match="the other is missing"):
            load_adapter(directory, facts)

    def test_a_pickle(self, change: Callable[..., Path], facts: BackboneFacts) -> None:
        directory = change()
        (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
        with pytest.raises(ConfigError, match=r"adapter_model\.bin is a pickle.*safe_serialization"):
            load_adapter(directory, facts)

    def test_a_classifier_without_its_head(self, change: Callable[..., Path], facts: BackboneFacts) -> None:
        with pytest.raises(ConfigError, match="no saved head"):
            load_adapter(change(task_type="SEQ_CLS"), facts)

    def test_nothing_at_all(self, change: Callable[..., Path], facts: BackboneFacts) -> None:
        with pytest.raises(ConfigError, match="holds no weights"):
            load_adapter(change(lambda found: {}), facts)


class TestHostile:
    def test_a_cut_file_is_refused(self, change: Callable[..., Path], facts: BackboneFacts) -> None:
        path = change() / "adapter_model.safetensors"
        whole = path.read_bytes()
        for n in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:n])
            with pytest.raises(ConfigError):
                load_adapter(path.parent, facts)

    @pytest.mark.parametrize("position", range(0, 64, 5))
    def test_a_flipped_byte_in_the_header_is_refused_or_harmless(
        self, position: int, change: Callable[..., Path], facts: BackboneFacts
    ) -> None:
        path = change() / "adapter_model.safetensors"
        damaged = bytearray(path.read_bytes())
        damaged[position] ^= 0x5A
        path.write_bytes(damaged)
        with pytest.raises(ConfigError):
            load_adapter(path.parent, facts)

    @pytest.mark.parametrize(
        ("method", "fields"),
        [
            ("LOHA", {"r": 10**9}),
            ("LOKR", {"decompose_factor": 10**12}),
            ("VERA", {"r": 10**9}),
            ("VERA", {"r": 8, "projection_prng_key": "x"}),
            ("FOURIERFT", {"n_frequency": 10**9}),
            ("OFT", {"oft_block_size": -7}),
            ("HRA", {"r": 1.5}),
            ("BOFT", {"boft_block_size": True}),
            ("HRA", {"r": 4}),  # tensors of LoRA
        ],
    )
    def test_numbers_that_would_allocate_or_run_anything_are_refused(
        self, method: str, fields: dict[str, Any], change: Callable[..., Path], facts: BackboneFacts
    ) -> None:
        with pytest.raises(ConfigError):
            load_adapter(change(peft_type=method, **fields), facts)

    def test_larger_than_allowed_is_refused_from_its_header_alone(
        self, change: Callable[..., Path], facts: BackboneFacts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        directory = change()

        def opened(*_: Any, **__: Any) -> None:
            raise AssertionError("nothing may be loaded")

        monkeypatch.setattr("node.compute.adapters.files.safe_open", opened)
        with pytest.raises(ConfigError, match="raise the budget"):
            load_adapter(directory, facts, bytes_max=1000)


class TestCards:
    def card(self, directory: Path, **fields: Any) -> None:
        found = {
            "name": "x", "digest": digest_of(directory), "method": "lora", "task": "chat", "first_layer": 3,
            "top_layers": 2,
        }  # fmt: skip
        write_card(directory, Card(**{**found, **fields}))

    def test_of_other_weights_is_refused(self, change: Callable[..., Path], facts: BackboneFacts) -> None:
        directory = change()
        self.card(directory, digest="00" * 32)
        with pytest.raises(ConfigError, match="card of other weights"):
            load_adapter(directory, facts)

    def test_of_another_backbone_names_both(self, change: Callable[..., Path], facts: BackboneFacts) -> None:
        directory = change()
        self.card(directory, backbone_sha256="22" * 32)
        with pytest.raises(ConfigError, match=r"222222222222.*111111111111"):
            load_adapter(directory, facts)
        self.card(directory, backbone_sha256="11" * 32)
        assert load_adapter(directory, facts).first_layer == 3


class TestCut:
    def test_is_where_something_really_changes(
        self, change: Callable[..., Path], facts: BackboneFacts
    ) -> None:
        """Some exporters write zeros for the layers that were never adapted."""
        below = "base_model.model.model.layers.0.self_attn.q_proj."
        zeros = {below + "lora_A.weight": torch.ones(4, 64), below + "lora_B.weight": torch.zeros(64, 4)}
        adapter = load_adapter(change(lambda found: {**found, **zeros}), facts)
        assert adapter.first_layer == 3 and adapter.n_layers == N_LAYERS
        moved = {**zeros, below + "lora_B.weight": torch.full((64, 4), 1e-30)}
        assert load_adapter(change(lambda found: {**found, **moved}), facts).first_layer == 0

    def test_bytes_are_those_of_its_numbers(self, change: Callable[..., Path], facts: BackboneFacts) -> None:
        found = load_file(change() / "adapter_model.safetensors")
        adapter = load_adapter(change(), facts)
        assert adapter.n_bytes == sum(t.nbytes for t in found.values())
