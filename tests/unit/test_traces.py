"""Published traces: read as they are; what is wrong is said with its line and what should be there."""

from __future__ import annotations

import itertools
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.traces import Request, TraceError, read_azure, read_mooncake

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:50.9951690,1,0
"""
MOONCAKE = """\
{"timestamp": 1000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 4500, "input_length": 7322, "output_length": 490, "hash_ids": []}
"""


def azure(text: str) -> list[Request]:
    return read_azure(text.splitlines(keepends=True), "a.csv")


def mooncake(text: str) -> list[Request]:
    return read_mooncake(text.splitlines(keepends=True), "m.jsonl")


def test_azure_gives_times_since_the_first_and_an_answer_of_at_least_one_token() -> None:
    first, second, third = azure(AZURE)
    assert (first.at_s, first.n_prompt_tokens, first.n_tokens) == (0.0, 374, 44)
    assert second.at_s == pytest.approx(4.314579)
    assert (third.at_s, third.n_tokens) == (second.at_s, 1)


def test_azure_columns_are_found_by_their_titles_and_zones_are_taken() -> None:
    text = "GeneratedTokens,TIMESTAMP,ContextTokens\n5,2024-05-10 00:00:00.009930+00:00,7\n"
    assert azure(text) == [Request(0.0, 7, 5)]


def test_mooncake_times_are_milliseconds() -> None:
    assert mooncake(MOONCAKE) == [Request(0.0, 6758, 500), Request(3.5, 7322, 490)]


def test_requests_come_in_order_of_time_whatever_the_order_of_lines() -> None:
    lines = AZURE.splitlines(keepends=True)
    assert azure("".join([lines[0], lines[3], lines[1], lines[2]]))[0].n_prompt_tokens == 374


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 0, "an empty file"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", 0, "titles only"),
        ("TIMESTAMP,Context\n", 1, "ContextTokens, GeneratedTokens missing"),
        (MOONCAKE, 1, "the titles TIMESTAMP,ContextTokens,GeneratedTokens"),
        (AZURE + "2023-11-16 18:15:5", 5, "2023-11-16 18:15:46.680590,374,44"),  # cut in the middle
        (AZURE + "yesterday,1,2\n", 5, "'yesterday,1,2'"),
        (AZURE + "2023-11-16 18:15:51,-1,2\n", 5, "such as"),
        (AZURE + "2023-11-16 18:15:51,nan,2\n", 5, "such as"),
        (AZURE + "2023-11-16 18:15:51,1.5,2\n", 5, "such as"),
        (AZURE + "2023-11-16 18:15:51,99999999999,2\n", 5, "such as"),
    ],
)
def test_a_damaged_azure_file_is_refused_with_its_line_and_what_is_expected(
    text: str, line: int, words: str
) -> None:
    with pytest.raises(TraceError) as caught:
        azure(text)
    assert caught.value.line == line
    assert words in str(caught.value)
    assert "a.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 0),
        ("\n\n", 0),
        (MOONCAKE + "{", 3),
        (MOONCAKE + "[]\n", 3),
        (MOONCAKE + '{"timestamp": 5}\n', 3),
        (MOONCAKE + '{"timestamp": -5, "input_length": 1, "output_length": 1}\n', 3),
        (MOONCAKE + '{"timestamp": NaN, "input_length": 1, "output_length": 1}\n', 3),
        (MOONCAKE + '{"timestamp": 5, "input_length": true, "output_length": 1}\n', 3),
        (MOONCAKE + '{"timestamp": 5, "input_length": "x", "output_length": 1}\n', 3),
        (AZURE, 1),
    ],
)
def test_a_damaged_mooncake_file_is_refused_with_its_line(text: str, line: int) -> None:
    with pytest.raises(TraceError) as caught:
        mooncake(text)
    assert caught.value.line == line
    assert "m.jsonl" in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200), st.booleans())
def test_any_text_is_read_or_refused_by_name(text: str, has_titles: bool) -> None:
    for read in (azure, mooncake):
        try:
            requests = read((AZURE if has_titles else "") + text)
        except TraceError:
            continue
        assert requests[0].at_s == 0.0
        assert all(one.at_s <= two.at_s for one, two in itertools.pairwise(requests))


# ── the generator ───────────────────────────────────────────────────────────────────────────────────


def test_a_seed_generates_the_same_requests_and_another_seed_others() -> None:
    spec = GeneratorSpec(tasks=50)
    assert generate(spec, Random(1)) == generate(spec, Random(1)) != generate(spec, Random(2))


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 4.0])
def test_the_rate_and_the_burstiness_are_what_was_asked(burstiness: float) -> None:
    requests = generate(GeneratorSpec(tasks=20_000, rate=5.0, burstiness=burstiness), Random(3))
    gaps_s = [two.at_s - one.at_s for one, two in itertools.pairwise(requests)]
    mean_s = sum(gaps_s) / len(gaps_s)
    squared_variation = sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s) / mean_s**2
    assert 1 / mean_s == pytest.approx(5.0, rel=0.06)
    assert squared_variation == pytest.approx(burstiness, rel=0.15)


def test_lengths_have_the_median_asked_and_stay_within_their_bounds() -> None:
    spec = GeneratorSpec(tasks=5000, prompt_tokens=300, prompt_tokens_max=2000, answer_tokens_max=64)
    requests = generate(spec, Random(4))
    prompts = sorted(request.n_prompt_tokens for request in requests)
    assert prompts[len(prompts) // 2] == pytest.approx(300, rel=0.1)
    assert prompts[0] >= 1
    assert prompts[-1] == 2000
    assert max(request.n_tokens for request in requests) == 64


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"burstiness": -1}, {"tasks": 0}, {"prompt_spread": 9}])
def test_a_description_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GeneratorSpec(**wrong)  # type: ignore[arg-type]
