"""Asking every node what it knows."""

from __future__ import annotations

from coordinator.recovery import Recalls
from mesh.core import Effect, Send
from mesh.ids import Epoch, NodeId
from mesh.messages import Inventory, Recall

A, B = NodeId("a"), NodeId("b")
EPOCH = Epoch(1, NodeId("me"))


def part(number: int, *, of_round: int, is_last: bool = False) -> Inventory:
    return Inventory(
        epoch=EPOCH, records=[], running=[], ended=[], is_last=is_last, round=of_round, part=number
    )


def rounds(effects: list[Effect]) -> dict[NodeId, int]:
    return {e.to: e.message.round for e in effects if isinstance(e, Send) and isinstance(e.message, Recall)}


def test_an_answer_is_whole_only_with_all_its_parts_in_any_order() -> None:
    recalls = Recalls(EPOCH)
    asked = rounds(recalls.ask([A], 0))[A]
    recalls.answered(A, part(2, of_round=asked, is_last=True))
    recalls.answered(A, part(0, of_round=asked))
    recalls.answered(A, part(0, of_round=asked))
    assert not recalls.is_complete
    recalls.answered(A, part(1, of_round=asked))
    assert recalls.is_complete


def test_parts_of_two_answers_do_not_make_a_whole_one() -> None:
    recalls = Recalls(EPOCH)
    first = rounds(recalls.ask([A], 0))[A]
    second = rounds(recalls.tick(recalls.wake_at))[A]
    recalls.answered(A, part(0, of_round=first))
    recalls.answered(A, part(1, of_round=second, is_last=True))
    assert not recalls.is_complete


def test_who_does_not_answer_is_asked_again_ever_more_rarely_until_it_is_gone() -> None:
    recalls = Recalls(EPOCH)
    recalls.ask([A, B], 0)
    waits, now = [], 0.0
    for _ in range(6):
        waits.append(recalls.wake_at - now)
        now = recalls.wake_at
        assert set(rounds(recalls.tick(now))) == {A, B}
    assert waits == sorted(waits) and max(waits) <= 5.0 and waits[0] < 0.5
    recalls.forget(A)
    recalls.forget(B)
    assert recalls.is_complete and recalls.wake_at == float("inf")
