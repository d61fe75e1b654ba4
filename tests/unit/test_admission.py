"""One row per verdict."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coordinator.admission import AdmissionConfig, Admit, Reject, admit
from coordinator.cluster import Node
from mesh.ids import NodeId
from mesh.messages import Submit
from tests.unit.task_world import info


def node(name: str = "a", *, standing: str = "alive", **fields: object) -> Node:
    return Node(id=NodeId(name), standing=standing, info=info(name, **fields))  # type: ignore[arg-type]


CONFIG = AdmissionConfig(open_max=10)


@pytest.mark.parametrize(
    ("submit", "nodes"),
    [
        (Submit(prompt="hi"), [node()]),
        (Submit(prompt="hi", model="tiny-1m"), [node()]),
        (Submit(prompt="hi", adapter="german"), [node(), node("b", adapters=("german",))]),
        (Submit(prompt="hi", model="anything"), []),  # a worker may still join
        (Submit(prompt="hi", model="anything"), [node(slots=0)]),
        (Submit(prompt="hi", max_tokens=2047), [node()]),
    ],
)
def test_what_some_node_may_be_able_to_do_is_admitted(submit: Submit, nodes: list[Node]) -> None:
    assert admit(submit, nodes, 0, CONFIG) == Admit()


def test_a_model_may_be_asked_for_by_any_name_its_node_gives() -> None:
    given = info("a")
    named = replace(node(), info=replace(given, also_called=["Tiny-1M-Instruct"]))
    wanted = Submit(prompt="hi", model="tiny-1m-instruct")
    assert admit(wanted, [named], 0, CONFIG) == Admit()
    assert isinstance(admit(wanted, [node()], 0, CONFIG), Reject)


@pytest.mark.parametrize(
    ("submit", "n_open", "reason", "may_try_again"),
    [
        (Submit(prompt="hi"), 10, "queue is full", True),
        (
            Submit(prompt="hi", model="other"),
            0,
            "no node serves model 'other'; served here: test/Tiny-1M",
            False,
        ),
        (
            Submit(prompt="hi", adapter="french"),
            0,
            "no node has adapter 'french': those there are: german",
            False,
        ),
        (Submit(prompt="hi", max_tokens=2048), 0, "longer than the context of 2048 tokens", False),
        (Submit(prompt="x" * 70_000), 0, "longer than the context", False),
    ],
)
def test_what_no_node_can_do_is_rejected_with_the_reason(
    submit: Submit, n_open: int, reason: str, may_try_again: bool
) -> None:
    verdict = admit(submit, [node(adapters=("german",))], n_open, CONFIG)
    assert isinstance(verdict, Reject)
    assert reason in verdict.reason
    assert (verdict.retry_after_s is not None) is may_try_again


def test_a_model_and_an_adapter_on_different_nodes_do_not_make_one() -> None:
    nodes = [node("a", model="x/One"), node("b", model="x/Two", adapters=("german",))]
    assert isinstance(admit(Submit(prompt="hi", model="one", adapter="german"), nodes, 0, CONFIG), Reject)


def test_what_a_dead_node_could_do_does_not_count() -> None:
    nodes = [node("a", model="x/One"), node("b", model="x/Two", standing="dead")]
    assert isinstance(admit(Submit(prompt="hi", model="two"), nodes, 0, CONFIG), Reject)
