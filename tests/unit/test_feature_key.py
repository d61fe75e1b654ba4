"""Keys of features: everything they depend on is in them, and no adapter is."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from mesh.errors import ConfigError
from node.compute.features.key import BLOCK_TOKENS, FeatureSpace, space_for

IDS = list(range(3 * BLOCK_TOKENS + 10))


def space(first_layer: int = 26, cut: int = 26) -> FeatureSpace:
    return space_for(
        first_layer,
        cut,
        backbone_digest="b" * 64,
        precision="fp32",
        tokenizer_digest="t" * 64,
        numerics="cpu-x86_64-avx2/torch-2.13.0/fp32/rows256-packed",
        codec="int8",
    )


def test_every_field_is_in_the_key() -> None:
    keys = space().keys(IDS)
    for field in fields(FeatureSpace):
        other = 25 if field.name == "cut" else "kv" if field.name == "kind" else "other"
        changed = replace(space(), **{field.name: other}).keys(IDS)
        assert not set(keys) & set(changed), field.name


def test_no_adapter_is_in_the_key() -> None:
    """Two adapters above one cut find each other's features."""
    assert space(26, 22).keys(IDS) == space(29, 22).keys(IDS)
    assert not [field.name for field in fields(FeatureSpace) if "adapter" in field.name]


def test_features_above_an_adapters_first_layer_are_refused_with_the_numbers() -> None:
    with pytest.raises(
        ConfigError, match=r"layer 26 .* layer 25 already: take features at layer 25 or below"
    ):
        space(25, 26)
    with pytest.raises(ConfigError):
        space(0, 1)
    assert space(26, 26) == space(30, 26)
    with pytest.raises(ConfigError):
        space(3, -1)


def test_texts_share_the_keys_of_their_common_beginning_and_no_others() -> None:
    keys = space().keys(IDS)
    assert len(keys) == 4 and len(set(keys)) == 4
    longer = space().keys([*IDS, 1, 2, 3])
    assert longer[:3] == keys[:3] and longer[3] != keys[3], "the last block was a short one"
    other = list(IDS)
    other[BLOCK_TOKENS] += 1
    assert space().keys(other)[0] == keys[0]
    assert not set(space().keys(other)[1:]) & set(keys), "a causal model: what comes later depends on it"


def test_a_block_is_not_the_same_at_another_place() -> None:
    block = list(range(BLOCK_TOKENS))
    keys = space().keys(block * 3)
    assert len(set(keys)) == 3


def test_no_tokens_no_keys() -> None:
    assert space().keys([]) == []


def test_keys_are_those_of_yesterday() -> None:
    """They are on disks: who changes what they are made of counts ``_SCHEMA`` up, and this value changes."""
    assert (
        space().keys([1, 2, 3])[0].hex() == "51980e9253f1839dae9374f45ca474130f846daba1c15a54a8fa3bc307e5bc77"
    )
