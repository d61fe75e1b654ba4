"""Choosing tokens and turning them into text."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from node.compute.serve.generate import Sampler, TextStream
from node.compute.threads import ThreadChoice


def decode_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer: every id is one byte."""
    return bytes(ids).decode("utf-8", "replace")


def pieces_of(text: str, stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(decode_bytes, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.add(byte))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces, stream


@given(st.text(max_size=40))
def test_pieces_are_whole_characters_and_add_up_to_the_text(text: str) -> None:
    pieces, stream = pieces_of(text)
    assert "".join(pieces) == stream.text == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_four_bytes_comes_in_one_piece() -> None:
    pieces, _ = pieces_of("a🦊b")
    assert pieces == ["a", "", "", "", "🦊", "b", ""]


def test_broken_bytes_do_not_hold_the_text_back_for_ever() -> None:
    stream = TextStream(decode_bytes)
    said = [stream.add(0xFF) for _ in range(4)] + [stream.add(ord("x"))]
    assert "".join(said).endswith("x") and "\ufffd" in "".join(said)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_string_and_nothing_after_it_is_given_out(text: str, stops: list[str]) -> None:
    pieces, stream = pieces_of(text, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert "".join(pieces) == text and not stream.stopped
        return
    # Tokens arrive one character at a time, so the stop string that is complete first decides.
    seen = text[: min(ends)]
    assert "".join(pieces) == seen[: min(at for stop in stops if (at := seen.find(stop)) >= 0)]
    assert stream.stopped


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    stream = TextStream(decode_bytes, ["END"])
    assert [stream.add(ord(c)) for c in "aENd"] == ["a", "", "", "ENd"]


def test_a_held_back_beginning_goes_out_at_the_end() -> None:
    pieces, _ = pieces_of("aEN", ["END"])
    assert pieces == ["a", "", "", "EN"]


def test_temperature_zero_takes_the_best() -> None:
    assert Sampler(0.0, 1.0, None).choose(torch.tensor([0.1, 3.0, 2.0])) == 1


def test_the_same_seed_gives_the_same_tokens_and_another_seed_does_not() -> None:
    logits = torch.zeros(1000)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(1.0, 1.0, seed)
        torch.rand(7)  # what others draw from the global generator must not matter
        return [sampler.choose(logits) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    ("top_p", "allowed"),
    [(0.01, {0}), (0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_shortest_front_that_holds_it(top_p: float, allowed: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    sampler = Sampler(1.0, top_p, 3)
    assert {sampler.choose(logits) for _ in range(400)} == allowed


def test_temperature_flattens_as_the_formula_says() -> None:
    logits = torch.tensor([0.8, 0.2]).log()
    sampler = Sampler(2.0, 1.0, 5)
    share = sum(sampler.choose(logits) == 0 for _ in range(4000)) / 4000
    assert share == pytest.approx(0.8**0.5 / (0.8**0.5 + 0.2**0.5), abs=0.03)


# ── threads ─────────────────────────────────────────────────────────────────────────────────────────


def steps(choice: ThreadChoice, n: int, time_of: dict[int, float]) -> dict[int, int]:
    used: dict[int, int] = {}
    for _ in range(n):
        used[choice.threads] = used.get(choice.threads, 0) + 1
        choice.saw(time_of[choice.threads])
    return used


def test_all_cores_are_kept_while_they_are_faster_and_trials_get_rare() -> None:
    choice = ThreadChoice(2)
    used = steps(choice, 2000, {2: 0.02, 1: 0.03})
    assert 0 < used[1] <= 2000 * 0.02


def test_nothing_is_tried_in_the_first_seconds_of_an_undisturbed_node() -> None:
    choice = ThreadChoice(2)
    assert steps(choice, 60, {2: 0.02, 1: 0.03}) == {2: 60}


def test_missing_processor_time_makes_it_try_fewer_threads_at_once() -> None:
    choice = ThreadChoice(2)
    choice.saw(0.15, cpu_share=0.6)
    assert choice.threads == 1
    for _ in range(4):
        choice.saw(0.04)
    assert choice.threads == 1


def test_fewer_threads_are_given_up_again_where_they_are_slower_though_crowded() -> None:
    choice = ThreadChoice(2)
    used = []
    for _ in range(1000):
        used.append(choice.threads)
        choice.saw({2: 0.02, 1: 0.05}[choice.threads], cpu_share={2: 0.8, 1: 1.0}[choice.threads])
    assert 0 < used.count(1) < 0.03 * len(used)


def test_a_busy_neighbour_makes_it_one_thread_within_a_few_steps() -> None:
    choice = ThreadChoice(2)
    steps(choice, 500, {2: 0.02, 1: 0.03})
    steps(choice, 40, {2: 0.15, 1: 0.04})
    assert choice.threads == 1


def test_it_comes_back_when_the_neighbour_is_gone() -> None:
    choice = ThreadChoice(2)
    steps(choice, 500, {2: 0.15, 1: 0.04})
    assert choice.threads == 1
    steps(choice, 1100, {2: 0.02, 1: 0.03})
    assert choice.threads == 2


def test_every_candidate_of_many_cores_is_tried() -> None:
    choice = ThreadChoice(8)
    steps(choice, 3000, {8: 0.05, 4: 0.02, 2: 0.03, 1: 0.05})
    assert choice.threads == 4


def test_one_core_has_nothing_to_choose() -> None:
    choice = ThreadChoice(1)
    steps(choice, 100, {1: 0.02})
    assert choice.threads == 1
