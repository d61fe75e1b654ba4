"""Attention states as entries: what comes back is what was put in, to the bit; anything else is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import DecodeError
from node.compute.backbone.contract import KeyValues
from node.compute.features.codec import CODECS
from node.compute.features.entry import HEADER_BYTES, Encoded
from node.compute.features.key import BLOCK_TOKENS, FeatureSpace
from node.compute.features.kv import decoded, fill, layer_groups, packed_states, row_width

ROOM = 4 * BLOCK_TOKENS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@st.composite
def written_states(draw: Any) -> KeyValues:
    """States of a whole prompt, of which the first positions may be another sequence's."""
    n_layers, heads, head_dim = (
        draw(st.integers(1, 5)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([2, 8])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from(DTYPES))

    def some(n: int) -> torch.Tensor:
        numbers = torch.randn(heads, n, head_dim, generator=generator) * 100
        numbers[numbers > 250] = -0.0
        numbers[numbers < -250] = 1e-30
        return numbers.to(dtype)

    starts = [draw(st.sampled_from([0, 1, 63, 64, 100, 192])) for _ in range(n_layers)]
    states = KeyValues(
        [some(ROOM - start) for start in starts],
        [some(ROOM - start) for start in starts],
        torch.zeros(ROOM, 1, head_dim),
        torch.zeros(ROOM, 1, head_dim),
        [(some(start), some(start)) if start else None for start in starts],
    )
    states.length = ROOM
    return states


def empty_like(states: KeyValues) -> KeyValues:
    keys = [torch.zeros(key.shape[0], ROOM, key.shape[2], dtype=key.dtype) for key in states.keys]
    return KeyValues(keys, [key.clone() for key in keys], states.cos, states.sin)


@given(states=written_states(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_states_come_back_to_the_bit_at_their_place_and_nowhere_else(states: KeyValues, data: Any) -> None:
    n_layers = len(states.keys)
    layers = data.draw(st.sampled_from(layer_groups(n_layers, 1, data.draw(st.integers(1, 8)))))
    start = BLOCK_TOKENS * data.draw(st.integers(0, 3))
    rows = packed_states(states, layers, start)
    width = len(layers) * row_width(states)
    assert rows.shape == (BLOCK_TOKENS, width)
    entry = Encoded.read(bytes(CODECS["raw"].encode(rows).payload))
    there = empty_like(states)
    fill(there, layers, start, decoded(entry, "raw", width))
    for layer in range(n_layers):
        expected = [torch.cat(pieces, dim=1) for pieces in zip(*states.seen(layer, ROOM), strict=True)]
        for mine, its in zip(expected, (there.keys[layer], there.values[layer]), strict=True):
            here = slice(start, start + BLOCK_TOKENS)
            assert bool((mine[:, here] == its[:, here]).all()) == (layer in layers) or not bool(mine.any())
            outside = torch.cat([its[:, :start], its[:, start + BLOCK_TOKENS :]], dim=1)
            assert not bool(outside.any()) and (layer in layers or not bool(its.any()))


@given(n_layers=st.integers(1, 130), layer_bytes=st.integers(1, 1 << 21), bytes_max=st.integers(1, 1 << 20))
@settings(max_examples=200, deadline=None)
def test_groups_are_all_layers_in_order_and_not_larger_than_allowed(
    n_layers: int, layer_bytes: int, bytes_max: int
) -> None:
    groups = layer_groups(n_layers, layer_bytes, bytes_max)
    assert [layer for group in groups for layer in group] == list(range(n_layers))
    assert all(len(group) * layer_bytes <= bytes_max or len(group) == 1 for group in groups)
    size = len(groups[-1])
    assert size == n_layers or size & (size - 1) == 0
    assert all((n_layers - group.stop) % size == 0 for group in groups)  # counted from the top


def test_the_groups_of_smollm2_begin_where_the_usual_adapters_do() -> None:
    groups = layer_groups(30, 64 * 2 * 3 * 64 * 4)
    assert {26, 22, 14} <= {group.start for group in groups} and len(groups) == 8


@given(cut=st.integers(0, HEADER_BYTES + 3 * BLOCK_TOKENS * 4 - 1))
@settings(max_examples=60, deadline=None)
def test_what_is_cut_short_or_of_another_shape_is_refused(cut: int) -> None:
    payload = bytes(CODECS["raw"].encode(torch.randn(BLOCK_TOKENS, 3)).payload)
    with pytest.raises(DecodeError):
        decoded(Encoded.read(payload[:cut]), "raw", 3)
    with pytest.raises(DecodeError):
        decoded(Encoded.read(payload), "raw", 4)
    with pytest.raises(DecodeError):
        decoded(Encoded.read(payload), "int8", 3)
    with pytest.raises(DecodeError):
        decoded(Encoded.read(bytes(CODECS["raw"].encode(torch.randn(63, 3)).payload)), "raw", 3)


SPACE = FeatureSpace("weights", "fp32", "tokens", 4, "kv", "avx2, served", "raw", 8)
OTHERS = [
    {"backbone_digest": "others"}, {"precision": "int8"}, {"tokenizer_digest": "others"}, {"cut": 3},
    {"kind": "hidden"}, {"numerics": "avx512, served"}, {"codec": "int8"}, {"until": 7}, {"until": 0},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_states_that_may_differ_have_other_names(other: dict[str, Any]) -> None:
    ids = list(range(130))
    assert not set(SPACE.keys(ids)) & set(replace(SPACE, **other).keys(ids))
    assert set(SPACE.keys(ids[:64])) < set(SPACE.keys(ids))  # whole blocks of one beginning have one name


def test_feature_maps_keep_the_names_they_had() -> None:
    space = FeatureSpace("weights", "fp32", "tokens", 4, "hidden", "numbers", "raw")
    # Written down before states had names of their own.
    assert (
        space.keys([1, 2, 3])[0].hex() == "175a7cbcc4eaea21f1ee257880fe5f0f1565e7ea18b09136465c76b9682d1c17"
    )
