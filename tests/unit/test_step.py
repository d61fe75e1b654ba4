"""One token of many sequences at a time: the answers of one sequence alone, in whatever slots they lie."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch

from node.compute.backbone.contract import Segment
from node.compute.backbone.deltas import Adapter, AdapterRows, Delta, Up
from node.compute.backbone.llama import LlamaBackbone
from node.compute.backbone.load import load_backbone
from tests.tiny import tiny_llama

N_TOKENS = 12
PROMPTS = [[7 + (13 * at + k) % 100 for k in range(2 + (at * 7) % 40)] for at in range(18)]
CAPACITIES = [64 + (at % 3) * 90 for at in range(18)]  # slots of two sizes


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaBackbone:
    found = load_backbone(tiny_llama(tmp_path_factory.mktemp("model")), "cpu", request.param)
    assert isinstance(found, LlamaBackbone)
    return found


def written(
    backbone: LlamaBackbone, which: Sequence[int], *, in_slots: bool = True
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens of each prompt, and the logits (step, prompt, vocabulary) they were chosen from."""
    states = [backbone.states(CAPACITIES[at]) for at in which]
    if not in_slots:
        for one in states:
            one.seat = None
    first = [Segment(s, PROMPTS[at]) for s, at in zip(states, which, strict=True)]
    tokens = backbone.logits(backbone.forward(first).rows).argmax(-1).tolist()
    steps, logits = [tokens], []
    for _ in range(N_TOKENS):
        segments = [Segment(s, [token]) for s, token in zip(states, tokens, strict=True)]
        logits.append(backbone.logits(backbone.forward(segments).rows))
        tokens = logits[-1].argmax(-1).tolist()
        steps.append(tokens)
    return [list(row) for row in zip(*steps, strict=True)], torch.stack(logits)


def test_a_sequence_writes_the_same_alone_and_among_others(backbone: LlamaBackbone) -> None:
    together, among_others = written(backbone, range(18))
    for at in (0, 5, 11, 17):
        alone, by_itself = written(backbone, [at])
        assert alone[0] == together[at]
        assert torch.allclose(by_itself[:, 0], among_others[:, at], rtol=0, atol=1e-5 * by_itself.abs().max())


def test_attended_together_is_attended_one_by_one(backbone: LlamaBackbone) -> None:
    together, logits = written(backbone, range(18))
    apart, reference = written(backbone, range(18), in_slots=False)
    assert together == apart
    # int8 rounds activations: a last bit that differs may move a digit.
    atol = {"fp32": 1e-5, "int8": 2e-2, "int4": 2e-2}[backbone.precision] * float(reference.abs().max())
    assert torch.allclose(logits, reference, rtol=0, atol=atol)


def test_a_slot_holds_nothing_of_who_sat_there_before(backbone: LlamaBackbone) -> None:
    expected = written(backbone, range(3))[0]
    states = [backbone.states(CAPACITIES[at]) for at in range(18)]
    for one in states:
        for keys, values in zip(one.keys, one.values, strict=True):
            keys.fill_(float("nan"))
            values.fill_(float("nan"))
    del one, keys, values, states
    gc.collect()
    assert written(backbone, range(3))[0] == expected


def low_rank(name: str, layers: Sequence[int], rank: int, seed: int) -> Adapter:
    """On q, v and down of ``layers`` of the tiny model (width 64, 4 heads, 2 of keys, 128 inside)."""
    g = torch.Generator().manual_seed(seed)

    def delta(d_in: int, *modules: tuple[int, int]) -> Delta:
        ups = tuple(Up(start, 0.3 * torch.randn(rows, rank, generator=g)) for start, rows in modules)
        return Delta(0.3 * torch.randn(rank * len(modules), d_in, generator=g), ups)

    deltas = {(layer, "qkv"): delta(64, (0, 64), (96, 32)) for layer in layers}
    deltas |= {(layer, "down"): delta(128, (0, 64)) for layer in layers}
    return Adapter(name, min(layers), 0, deltas)  # type: ignore[arg-type]


def test_adapters_inside_the_script_are_the_adapters_outside(backbone: LlamaBackbone) -> None:
    """Of unequal ranks, on all layers and on the last one, several rows of one, and rows of nobody."""
    kinds = [low_rank("b", range(5), 4, 1), low_rank("a", range(5), 7, 2), low_rank("c", [4], 3, 3)]
    whose = [kinds[0], kinds[1], None, kinds[2], kinds[1], kinds[0], kinds[1]]

    def logits() -> torch.Tensor:
        states = [backbone.states(64) for _ in whose]
        prompts = [Segment(s, PROMPTS[at], a) for at, (s, a) in enumerate(zip(states, whose, strict=True))]
        tokens = backbone.logits(backbone.forward(prompts).rows).argmax(-1).tolist()
        segments = [Segment(s, [t], a) for s, t, a in zip(states, tokens, whose, strict=True)]
        return backbone.logits(backbone.forward(segments).rows, whose)

    rows = AdapterRows.of([(adapter, 1) for adapter in whose])
    assert rows is not None and rows.for_script(4, torch.float32) is not None
    inside, scripts = logits(), backbone._scripts
    backbone._scripts = [None] * len(scripts)
    try:
        outside = logits()
    finally:
        backbone._scripts = scripts
    assert torch.equal(inside, outside)
