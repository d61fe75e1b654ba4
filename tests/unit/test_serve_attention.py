"""Attention over states in several places, and passes that let go of rows nobody wants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from node.compute.backbone import attention
from node.compute.backbone.attention import attend
from node.compute.backbone.contract import Segment
from node.compute.backbone.llama import LlamaBackbone
from node.compute.backbone.load import load_backbone


def plain_attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Row by row, head by head, in float64."""
    n, heads, head_dim = query.shape
    kv_heads, end, _ = keys.shape
    result = torch.zeros(n, heads, head_dim, dtype=torch.float64)
    for row in range(n):
        for head in range(heads):
            own = head // (heads // kv_heads)
            visible = end - n + row + 1
            scores = keys[own, :visible].double() @ query[row, head].double() / head_dim**0.5
            result[row, head] = torch.softmax(scores, 0) @ values[own, :visible].double()
    return result.reshape(n, -1)


@pytest.mark.parametrize("n", [1, 2, 7, 40])
@pytest.mark.parametrize("places", [(), (0,), (5,), (64, 3), (17, 0, 9)])
@pytest.mark.parametrize("has_logarithms", [True, False])
def test_states_in_several_places_are_seen_as_one(
    n: int, places: tuple[int, ...], has_logarithms: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_logarithms:
        monkeypatch.setattr(attention, "_flash", None)
    torch.manual_seed(n)
    keys, values = torch.randn(2, 2, sum(places) + n, 16)
    query = torch.randn(n, 6, 16)
    seen, start = [], 0
    for size in places:
        seen.append((keys[:, start : start + size], values[:, start : start + size]))
        start += size
    found = attend(query, seen, (keys[:, start:], values[:, start:]))
    assert torch.allclose(found.double(), plain_attention(query, keys, values), atol=1e-5)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> LlamaBackbone:
    torch.manual_seed(5)
    directory: Path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=97, max_position_embeddings=512,
        )
    ).save_pretrained(directory)  # fmt: skip
    found = load_backbone(directory)
    assert isinstance(found, LlamaBackbone)
    return found


IDS = torch.randint(0, 97, (120,), generator=torch.Generator().manual_seed(2)).tolist()


def test_wanted_rows_are_the_same_whatever_else_is_wanted(backbone: LlamaBackbone) -> None:
    whole = backbone.forward([Segment(backbone.states(120), IDS, n_wanted=120)]).rows
    for n_wanted in (0, 1, 50):
        rows = backbone.forward([Segment(backbone.states(120), IDS, n_wanted=n_wanted)]).rows
        assert rows.shape == (n_wanted, 64) and torch.allclose(rows, whole[120 - n_wanted :], atol=1e-5)


def test_rows_come_in_the_order_of_the_segments_though_some_enter_late(backbone: LlamaBackbone) -> None:
    below = backbone.states(120)
    hidden = backbone.features([Segment(below, IDS[:40])], cut=3)
    below.length = 0
    late = Segment(below, IDS[:40], hidden=hidden, enters=3, n_wanted=2)
    early = Segment(backbone.states(120), IDS[50:90], n_wanted=3)
    rows = backbone.forward([late, early]).rows
    first = backbone.forward([Segment(backbone.states(120), IDS[:40], n_wanted=2)]).rows
    second = backbone.forward([Segment(backbone.states(120), IDS[50:90], n_wanted=3)]).rows
    assert torch.allclose(rows, torch.cat([first, second]), atol=1e-5)


def test_another_sequence_goes_on_from_shared_states_and_changes_none(backbone: LlamaBackbone) -> None:
    reader = backbone.states(120)
    backbone.forward([Segment(reader, IDS[:70], n_wanted=0)])
    before = [reader.block(0, 70, 5)[0].clone(), reader.block(0, 70, 5)[1].clone()]
    shared = [reader.seen(layer, 60)[0] for layer in range(5)]
    other = backbone.states(120, shared)
    other.length = 60
    rows = [backbone.forward([Segment(other, IDS[80:100])]).rows]
    rows += [backbone.forward([Segment(other, [token])]).rows for token in IDS[100:105]]
    alone = backbone.forward([Segment(backbone.states(120), IDS[:60] + IDS[80:105], n_wanted=6)]).rows
    assert torch.allclose(torch.cat(rows), alone, atol=1e-5)
    assert torch.equal(reader.block(0, 70, 5)[0], before[0])
    assert torch.equal(reader.block(0, 70, 5)[1], before[1])
