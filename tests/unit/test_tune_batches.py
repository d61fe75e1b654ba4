"""Records to examples, and their order: what is learned, in which pieces."""

from __future__ import annotations

import json

import pytest

from mesh.errors import ConfigError
from node.compute.tune.batches import Example, TuneTokens, batches, encoded, pieces
from node.compute.tune.records import read_records
from tests.tiny import tiny_llama


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TuneTokens:
    return TuneTokens(tiny_llama(tmp_path_factory.mktemp("model"), layers=1), max_tokens=12)


def words(tokens: TuneTokens, ids: tuple[int, ...]) -> str:
    return str(tokens._tokenizer.decode(ids))


def examples(tokens: TuneTokens, task: str, **fields: object) -> list[Example]:
    records = read_records(json.dumps(fields), task)  # type: ignore[arg-type]
    return list(encoded(records, tokens, skip_bad=False))


def test_a_text_is_judged_at_its_last_token(tokens: TuneTokens) -> None:
    (one,) = examples(tokens, "classify", text="w1 w2 w3", label="x")
    assert (words(tokens, one.ids), one.wanted, one.targets) == ("w1 w2 w3", (2,), (0,))


def test_of_a_completion_the_answer_and_its_end_are_learned(tokens: TuneTokens) -> None:
    (one,) = examples(tokens, "complete", prompt="w1 w2", completion="w3 w4")
    assert words(tokens, one.ids) == "w1 w2 w3 w4", "nobody reads what follows the end"
    assert one.wanted == (1, 2, 3)
    assert words(tokens, one.targets) == "w3 w4 </s>"


def test_of_a_chat_every_answer_is_learned_and_no_question(tokens: TuneTokens) -> None:
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (one,) = examples(tokens, "chat", messages=messages)
    assert words(tokens, one.targets) == "w2 <|end|> w4 <|end|>"
    assert [words(tokens, one.ids[: at + 1]).split()[-1] for at in one.wanted] == [
        "<|assistant|>",
        "w2",
        "<|assistant|>",
        "w4",
    ]


def test_the_invocation_is_what_the_template_opens_an_answer_with(tokens: TuneTokens) -> None:
    assert words(tokens, tokens.invocation()) == "<|assistant|>"


def test_a_long_text_is_cut_and_a_long_question_is_refused(tokens: TuneTokens) -> None:
    (one,) = examples(tokens, "classify", text="w1 " * 40, label="x")
    assert len(one.ids) == 12
    with pytest.raises(ConfigError, match="line 1: within 12 tokens there is no answer"):
        examples(tokens, "complete", prompt="w1 " * 12, completion="w2")


def test_every_epoch_has_each_example_once_in_an_order_of_its_own() -> None:
    first, again, second = batches(10, 4, 7, 0), batches(10, 4, 7, 0), batches(10, 4, 7, 1)
    assert first == again != second
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert sorted(number for batch in first for number in batch) == list(range(10))


def test_pieces_hold_at_most_so_many_rows_or_one_example() -> None:
    lengths = [5, 3, 9, 1, 4, 20]
    found = [Example(tuple(range(n)), (n - 1,), (0,)) for n in lengths]
    cut = pieces(found, range(6), 10)
    assert sorted(number for piece in cut for number in piece) == list(range(6))
    assert all(sum(lengths[number] for number in piece) <= 10 or len(piece) == 1 for piece in cut)
    assert len(cut) == 4
