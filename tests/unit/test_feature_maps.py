"""Features of texts on a tiny random model: cached equals uncached, whatever stood beside them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mesh.errors import ConfigError
from node.compute.backbone.contract import Segment
from node.compute.backbone.llama import LlamaBackbone
from node.compute.backbone.load import load_backbone
from node.compute.features.codec import CODECS, choose_codec
from node.compute.features.key import FeatureSpace
from node.compute.features.maps import CodecBoundError, FeatureMaps, MissingFeaturesError
from node.compute.features.shape import PASS_ROWS, Numerics, filled, numerics_string, packed, prove
from node.compute.features.store import LocalStore

CUT, WIDTH = 3, 64


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    path = tmp_path_factory.mktemp("tiny")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def backbone(directory: Path) -> LlamaBackbone:
    found = load_backbone(directory)
    assert isinstance(found, LlamaBackbone)
    return found


@pytest.fixture(scope="module")
def numerics(backbone: LlamaBackbone) -> Numerics:
    return prove(backbone)


def space(numerics: Numerics, codec: str = "raw") -> FeatureSpace:
    return FeatureSpace("b", "fp32", "t", CUT, "hidden", numerics.text, codec)


def texts(seed: int = 0, n: int = 20, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(101) for _ in range(rng.randint(1, longest))] for _ in range(n)]


def memory() -> LocalStore:
    return LocalStore(None, 1 << 26, 0)


class Counted:
    """A backbone that counts its passes and their rows."""

    def __init__(self, inner: LlamaBackbone) -> None:
        self._inner = inner
        self.rows: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def features(self, segments: list[Segment], cut: int) -> Tensor:
        self.rows.append(sum(len(segment.ids) for segment in segments))
        return self._inner.features(segments, cut)


def test_features_are_what_transformers_computes(
    directory: Path, backbone: LlamaBackbone, numerics: Numerics
) -> None:
    model = LlamaForCausalLM.from_pretrained(directory).eval()
    some = [*texts(n=5), *texts(1, n=1, longest=1), [*range(100)] * 7]
    features = FeatureMaps(backbone, space(numerics), memory(), numerics=numerics).read(some)
    for ids, x in zip(some, features, strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[CUT][0]
        assert x.shape == (len(ids), WIDTH)
        torch.testing.assert_close(x, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("codec", list(CODECS))
def test_cached_equals_uncached_to_the_last_bit(
    codec: str, backbone: LlamaBackbone, numerics: Numerics, tmp_path: Path
) -> None:
    some = [*texts(2), list(range(101)) * 3]
    fresh = FeatureMaps(backbone, space(numerics, codec), LocalStore(tmp_path, 0, 1 << 24), numerics=numerics)
    computed = fresh.read(some)
    assert (fresh.hits, fresh.misses) == (0, 21)
    # Another process, which holds no layers below the cut, and texts in another order.
    cached = FeatureMaps(None, space(numerics, codec), LocalStore(tmp_path, 0, 1 << 24))
    found = cached.read(some[::-1])[::-1]
    assert (cached.hits, cached.misses) == (21, 0)
    assert cached.seconds_saved > 0 and cached.tokens_found == sum(map(len, some))
    assert all(torch.equal(a, b) for a, b in zip(computed, found, strict=True))


@pytest.mark.parametrize("codec", list(CODECS))
def test_neighbours_do_not_change_a_bit(codec: str, backbone: LlamaBackbone, numerics: Numerics) -> None:
    """Computed alone, among others, and among yet others: the same features."""
    mine = [[5, 6, 7], list(range(48)), list(range(101)) * 4]
    alone = [
        FeatureMaps(backbone, space(numerics, codec), memory(), numerics=numerics).read([ids])[0]
        for ids in mine
    ]
    for seed in (3, 4):
        maps = FeatureMaps(backbone, space(numerics, codec), memory(), numerics=numerics)
        among = maps.read([*texts(seed), *mine, *texts(seed + 10)])[20:23]
        assert all(torch.equal(a, b) for a, b in zip(alone, among, strict=True))


def test_every_pass_has_the_same_number_of_rows_and_few_are_thrown_away(
    backbone: LlamaBackbone, numerics: Numerics
) -> None:
    counted = Counted(backbone)
    some = [*texts(5, n=200, longest=48), list(range(101)) * 6]
    maps = FeatureMaps(counted, space(numerics), memory(), numerics=numerics)
    maps.read(some)
    assert set(counted.rows) == {PASS_ROWS}
    if numerics.is_packed:
        n_tokens = sum(map(len, {tuple(ids) for ids in some}))
        assert sum(counted.rows) <= 1.05 * n_tokens + PASS_ROWS
    n_passes = len(counted.rows)
    maps.read(some)
    assert len(counted.rows) == n_passes, "nothing is computed twice"


def test_one_text_in_a_pass_where_rows_are_not_alike(backbone: LlamaBackbone, numerics: Numerics) -> None:
    counted = Counted(backbone)
    alone = Numerics(False, 1, numerics_string("cpu", "fp32", False, 1))
    threads = torch.get_num_threads()
    found = FeatureMaps(counted, space(alone), memory(), numerics=alone).read(texts(6, n=5))
    assert counted.rows == [PASS_ROWS] * 5 and torch.get_num_threads() == threads
    packed_ = FeatureMaps(backbone, space(numerics), memory(), numerics=numerics).read(texts(6, n=5))
    for a, b in zip(found, packed_, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert space(alone).keys([1]) != space(numerics).keys([1])


def test_a_model_whose_rows_depend_on_their_neighbours_is_found_out(backbone: LlamaBackbone) -> None:
    class Careless(Counted):
        def features(self, segments: list[Segment], cut: int) -> Tensor:
            x = super().features(segments, cut)
            return x + 1e-6 * len(segments)

    class Hasty(Counted):
        def features(self, segments: list[Segment], cut: int) -> Tensor:
            return super().features(segments, cut) * (1 + 1e-6 * torch.get_num_threads())

    found = prove(Careless(backbone))
    assert not found.is_packed and "alone" in found.text
    found = prove(Hasty(backbone), threads_max=2)
    assert found.threads == 2 and "threads2" in found.text


def test_pieces_are_cut_at_multiples_from_the_beginning_and_each_token_is_in_one() -> None:
    lengths = [1, 255, 256, 257, 600, 48, 48, 30, 0]
    passes = list(packed(lengths))
    assert all(sum(piece.n for piece in pieces) <= PASS_ROWS for pieces in passes)
    seen: dict[int, list[int]] = {}
    for pieces in passes:
        for piece in pieces:
            assert piece.start % PASS_ROWS == 0
            seen.setdefault(piece.text, []).extend(range(piece.start, piece.stop))
    assert seen == {text: list(range(n)) for text, n in enumerate(lengths) if n}, "in order, too"
    assert len(passes) == 6


def test_a_reading_goes_in_steps_and_nothing_is_lost_if_it_is_left(
    backbone: LlamaBackbone, numerics: Numerics, tmp_path: Path
) -> None:
    clock = iter(range(0, 10**6, 5)).__next__  # every pass seems to take seconds, so all is kept at once
    maps = FeatureMaps(
        backbone, space(numerics), LocalStore(tmp_path, 0, 1 << 26), numerics=numerics, clock=clock
    )
    some = texts(7, n=60)
    reading = maps.reading(some, keep=False)
    fractions = []
    for _ in range(3):
        assert not reading.step()
        fractions.append(reading.fraction)
    assert fractions == sorted(fractions) and 0 < fractions[-1] < 1
    again = FeatureMaps(backbone, space(numerics), LocalStore(tmp_path, 0, 1 << 26), numerics=numerics)
    told: list[float] = []
    assert len(again.read(some, told.append)) == 60
    assert again.hits > 0 and again.hits + again.misses == len({tuple(ids) for ids in some})
    assert told == sorted(told)


def test_without_the_lower_layers_missing_features_are_refused_with_what_to_do(numerics: Numerics) -> None:
    maps = FeatureMaps(None, space(numerics), memory())
    with pytest.raises(MissingFeaturesError, match=r"1 texts \(3 tokens\) at layer 3 .* whole model"):
        maps.read([[1, 2, 3]])
    assert maps.read([]) == []


def test_a_codec_that_is_further_off_than_the_task_accepts_is_refused(
    backbone: LlamaBackbone, numerics: Numerics
) -> None:
    with pytest.raises(CodecBoundError, match="take codec int8 or raw"):
        FeatureMaps(backbone, space(numerics, "int4"), memory(), numerics=numerics, error_bound=0.01).read(
            texts()
        )
    FeatureMaps(backbone, space(numerics, "raw"), memory(), numerics=numerics, error_bound=0.0).read(texts())


def test_stored_entries_of_another_shape_are_computed_again(
    backbone: LlamaBackbone, numerics: Numerics
) -> None:
    """A peer may send anything under a key."""
    kept = memory()
    maps = FeatureMaps(backbone, space(numerics), kept, numerics=numerics)
    (expected,) = maps.read([[1, 2, 3]])
    (right,) = kept.get(space(numerics).keys([1, 2, 3]))
    assert right is not None
    for wrong in (torch.zeros(4, WIDTH), torch.zeros(3, WIDTH + 1)):
        entry = type(right)(CODECS["raw"].encode(wrong), 1.0)
        kept.put({space(numerics).keys([1, 2, 3])[0]: entry})
        assert torch.equal(maps.read([[1, 2, 3]])[0], expected)
    assert maps.misses == 3


def test_another_numerics_profile_or_cut_than_the_backbones_is_refused(
    backbone: LlamaBackbone, numerics: Numerics
) -> None:
    other = FeatureSpace("b", "fp32", "t", CUT, "hidden", "cuda", "raw")
    with pytest.raises(ConfigError, match="last bits differ"):
        FeatureMaps(backbone, other, memory(), numerics=numerics)
    with pytest.raises(ConfigError, match="cut 9 of a model of 4 layers"):
        FeatureMaps(
            backbone, FeatureSpace("b", "fp32", "t", 9, "hidden", numerics.text, "raw"), memory(),
            numerics=numerics,
        )  # fmt: skip


def test_a_node_without_lower_layers_names_the_same_profile(numerics: Numerics) -> None:
    if numerics.is_packed and numerics.threads is None:
        assert numerics_string("cpu", "fp32") == numerics.text


def test_filling_up_leaves_full_passes_alone(backbone: LlamaBackbone) -> None:
    full = [Segment(backbone.states(PASS_ROWS), [1] * PASS_ROWS)]
    assert filled(backbone, full) == full
    assert [len(segment.ids) for segment in filled(backbone, [])] == [PASS_ROWS]


@pytest.mark.parametrize(
    ("error_bound", "pressure", "codec", "why"),
    [
        (0.0, 9.0, "raw", "no error is accepted"),
        (0.01, 9.0, "raw", "int8 may be off"),
        (0.5, 0.1, "raw", "10% of the cache"),
        (0.1, 1.5, "int8", "raw would take 150%"),
        (0.1, 90.0, "int8", "0.1 is accepted"),
        (0.5, 1.5, "int8", "40% of the cache"),
        (0.5, 3.0, "int4", "raw would take 300%"),
    ],
)
def test_the_codec_follows_the_accepted_error_and_the_room(
    error_bound: float, pressure: float, codec: str, why: str
) -> None:
    choice = choose_codec(error_bound, pressure)
    assert choice.codec == codec and why in choice.reason and choice.reason.startswith(codec)


def test_an_impossible_error_bound_is_refused() -> None:
    for bad in (-0.1, float("nan")):
        with pytest.raises(ConfigError):
            choose_codec(bad, 1.0)
