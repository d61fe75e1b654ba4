"""Tuning jobs go where their features are, when that is worth it; whoever lies about it costs time only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from coordinator.cluster import Node
from coordinator.locality import Claims, Locality, name_of
from coordinator.policy.cost import CostModel, Observed
from coordinator.policy.decisions import Candidate, NodeView, Start
from coordinator.policy.dispatch import Dispatcher
from coordinator.policy.policies import policy_named
from coordinator.policy.rates import PARTS, Rates
from coordinator.policy.work import Work, work_of
from mesh.ids import NodeId, TaskId
from mesh.messages import Assign, FeaturesHeld, NodeRates, Outcome, Output, Submit, TuneSpec
from mesh.messages.tune import features_identity
from node.faces.why import candidate_rows
from tests.unit.task_world import MODEL, World, answer_of, info, mesh
from tests.unit.test_dispatch import job, node, starts

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
PROFILE = "fp32 some numerics"
SPEC = TuneSpec(adapter="one", data='{"text": "w1", "label": "a"}\n' * 100, top_layers=2, epochs=3)
KEYS = [bytes([number]) * 32 for number in range(32)]
HELD = FeaturesHeld(
    top_layers=2,
    profile=PROFILE,
    n_tokens=10_000,
    n_bytes=20_000_000,
    sample_keys=[key.hex() for key in KEYS],
)
RATES = Rates(features_tokens_per_s=100.0, tune_tokens_per_s=1000.0)
"""Features take 100 s to compute and, at 20 MB/s, 1 s to fetch; three epochs take 30 s."""


def submit(spec: TuneSpec = SPEC) -> Submit:
    return Submit(kind="tune", tune=spec)


def here(name: str, **changes: object) -> Node:
    said = replace(info(name), **{"features_profile": PROFILE, **changes})  # type: ignore[arg-type]
    return Node(id=NodeId(name), standing="alive", info=said)


def having(**parts: slice) -> Claims:
    """Each node claims a part of ``KEYS``."""
    held = {name: frozenset(KEYS[part]) for name, part in parts.items()}
    return lambda node, key: key in held.get(node, frozenset())


def taught(claims: Claims, at: float = -1000.0, node: NodeId = A, **changes: object) -> Locality:
    locality = Locality(claims)
    locality.learn(submit(), replace(HELD, **changes), node, MODEL, at)  # type: ignore[arg-type]
    return locality


def work(locality: Locality, spec: TuneSpec = SPEC) -> Work:
    return locality.work(submit(spec), work_of(submit(spec)))


def shares(locality: Locality, *nodes: Node, rates: Rates = RATES, now: float = 0.0) -> dict[str, object]:
    found = locality.shares(work(locality), [(node, rates) for node in nodes], now)
    assert found is not None
    return {str(node): share for node, share in found.items()}


# ── what is known ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"adapter": "two", "seed": 7, "epochs": 9, "rank": 2, "learning_rate": 0.1, "batch": 3}, True),
        ({"method": "dora", "holders": [A]}, True),
        ({"data": SPEC.data + "\n"}, False),  # type: ignore[operator]
        ({"eval_data": SPEC.data}, False),
        ({"max_tokens": 7}, False),
        ({"top_layers": 3}, False),
        ({"method": "alora"}, False),
        ({"feature_error": 0.1}, False),
    ],
)
def test_jobs_share_features_if_they_read_the_same_texts_at_the_same_cut(
    changes: dict[str, object], is_same: bool
) -> None:
    other = replace(SPEC, **changes)  # type: ignore[arg-type]
    assert (features_identity(other) == features_identity(SPEC)) == is_same


def test_records_sent_along_and_the_same_in_a_file_read_the_same_features() -> None:
    from hashlib import sha256

    digest = sha256((SPEC.data or "").encode()).hexdigest()
    assert features_identity(replace(SPEC, data=None, data_sha256=digest)) == features_identity(SPEC)


def test_a_known_job_is_counted_by_what_it_really_read() -> None:
    guessed = work_of(submit())
    assert work(Locality()) == guessed, "nothing is known: nothing changes"
    known = work(taught(having()))
    assert (known.n_feature_tokens, known.n_feature_bytes, known.n_tune_tokens) == (10_000, 20e6, 30_000)
    assert known.reuses == name_of(SPEC)
    chat = Submit(prompt="hello")
    assert taught(having()).work(chat, work_of(chat)) == work_of(chat)


def test_who_leaves_the_layers_open_is_expected_to_get_those_of_the_last_one() -> None:
    locality = Locality(having(a=slice(0, 32)))
    open_spec = replace(SPEC, top_layers=None)
    assert len(locality.learn(submit(open_spec), HELD, A, MODEL, 0.0)) == 2
    assert work(locality, open_spec).n_feature_bytes and work(locality, SPEC).n_feature_bytes
    asked = Locality(having())
    assert asked.learn(submit(), HELD, A, MODEL, 0.0) == [name_of(SPEC)]
    assert not work(asked, open_spec).n_feature_bytes, "who asks for layers says nothing of a choice"


def test_the_newest_are_kept_and_an_outcome_without_keys_says_nothing() -> None:
    locality = Locality(having())
    for seed in range(400):
        spec = replace(SPEC, max_tokens=1 + seed)
        locality.learn(submit(spec), HELD, A, MODEL, float(seed))
    assert not work(locality, replace(SPEC, max_tokens=1)).n_feature_bytes
    assert work(locality, replace(SPEC, max_tokens=400)).n_feature_bytes
    assert locality.learn(submit(), replace(HELD, sample_keys=[]), A, MODEL, 0.0) == []
    for profile in range(50):  # bounded, whatever nodes say
        locality.learn(submit(), replace(HELD, profile=f"p{profile}"), A, MODEL, 0.0)
    assert len(locality._known[name_of(SPEC)]) <= 4


# ── who has how much ────────────────────────────────────────────────────────────────────────────────


def test_shares_are_there_at_others_or_nowhere() -> None:
    locality = taught(having(a=slice(0, 16), b=slice(8, 24)))
    assert shares(locality, here("a"), here("b"), here("c")) == {
        "a": (0.5, 0.25),
        "b": (0.5, 0.25),
        "c": (0.0, 0.75),
    }


def test_a_node_that_only_keeps_features_counts_as_a_holder() -> None:
    locality = taught(having(b=slice(0, 32)))
    assert shares(locality, here("a"), here("b", slots=0))["a"] == (0.0, 1.0)


@pytest.mark.parametrize(
    ("bytes_per_s", "far"),
    [(20e6, 1.0), (0.21e6, 1.0), (0.19e6, 0.0)],  # 20 MB against 100 s of computing
)
def test_what_takes_longer_to_fetch_than_to_compute_is_not_fetched(bytes_per_s: float, far: float) -> None:
    locality = taught(having(a=slice(0, 32)))
    rates = replace(RATES, fetch_bytes_per_s=bytes_per_s)
    assert shares(locality, here("a"), here("b"), rates=rates) == {"a": (1.0, 0.0), "b": (0.0, far)}
    top = here("b", holds="top")
    assert shares(locality, here("a"), top, rates=rates)["b"] == (0.0, 1.0), "it has no choice"


def test_another_model_has_none_and_another_profile_only_where_most_is_held() -> None:
    other = here("b", features_profile="bf16 other numerics")
    most, few = taught(having(a=slice(0, 20))), taught(having(a=slice(0, 10)))
    assert shares(most, here("a"), other)["b"] == (0.0, 20 / 32)
    assert "b" not in shares(few, here("a"), other), "it computes its own"
    assert "b" not in shares(most, here("a"), here("b", model="test/Other-1M"))


def test_who_has_just_done_it_has_the_features_though_its_catalogue_is_behind() -> None:
    locality = taught(having(), at=0.0)
    assert shares(locality, here("a"), here("b"), now=3.0) == {"a": (1.0, 0.0), "b": (0.0, 1.0)}
    assert shares(locality, here("a"), here("b"), now=9.0) == {"a": (0.0, 0.0), "b": (0.0, 0.0)}


def test_a_large_mesh_is_asked_for_fewer_keys() -> None:
    asked = 0

    def claims(node: NodeId, key: bytes) -> bool:
        nonlocal asked
        asked += 1
        return node == "n7"

    locality = taught(claims)
    many = [here(f"n{number}") for number in range(1000)]
    assert shares(locality, *many)["n7"] == (1.0, 0.0)
    assert asked <= 4096


def test_links_are_learned_by_whole_fetches() -> None:
    fetched = replace(HELD, n_fetched=10_000, fetch_s=4.0)
    locality = Locality()
    assert locality.fetch_bytes_per_s(B) == 20e6
    for _ in range(8):
        locality.learn(submit(), fetched, B, MODEL, 0.0)
    assert locality.fetch_bytes_per_s(B) == pytest.approx(5e6)
    assert locality.fetch_bytes_per_s(C) == 20e6
    locality.learn(submit(), replace(fetched, n_fetched=1, fetch_s=60.0), B, MODEL, 0.0)
    assert locality.fetch_bytes_per_s(B) == pytest.approx(5e6), "too little to say anything"


# ── what it costs ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("near", "far", "parts"),
    [
        (1.0, 0.0, {"tune": 30.0}),
        (0.0, 1.0, {"fetch": 1.0, "tune": 30.0}),
        (0.0, 0.0, {"features": 100.0, "tune": 30.0}),
        (0.5, 0.25, {"fetch": 0.25, "features": 25.0, "tune": 30.0}),
    ],
)
def test_what_is_there_costs_nothing_what_is_elsewhere_its_bytes_and_the_rest_is_computed(
    near: float, far: float, parts: dict[str, float]
) -> None:
    known = work(taught(having()))
    estimate = CostModel().estimate(known, A, RATES, reuse=near, far=far)
    assert {name: part for name, part in estimate.parts.items() if part} == pytest.approx(parts)
    assert set(estimate.parts) == set(PARTS)


def test_what_was_learned_about_a_node_goes_on_counting() -> None:
    known, model = work(taught(having())), CostModel()
    for _ in range(20):
        model.learn(known, A, RATES, Observed(service_s=62.0), far=1.0)  # expected: 31 s
    assert model.correction("tune", A) == pytest.approx(2.0, rel=0.02)
    assert model.estimate(known, A, RATES, far=1.0).service_s == pytest.approx(62.0, rel=0.02)


# ── where it goes ───────────────────────────────────────────────────────────────────────────────────


def placed(nodes: list[NodeView], held: dict[str, tuple[float, float]], policy: str = "foresight") -> Start:
    known = work(taught(having()))
    made = Dispatcher(policy_named(policy), CostModel())
    for view in nodes:
        made.put_node(view)
    made.add(job("t", work=known), 0.0)
    made.set_shares(known.reuses or "", {NodeId(name): share for name, share in held.items()})
    (start,) = made.decide(0.0)
    assert isinstance(start, Start)
    return start


@pytest.mark.parametrize("policy", ["foresight", "vdf"])
@pytest.mark.parametrize(
    ("speed", "held", "where"),
    [
        (2.0, {"slow": (1.0, 0.0)}, "slow"),  # 30 s there, 65 s on the node that is twice as fast
        (2.0, {"slow": (1.0, 0.0), "fast": (0.0, 1.0)}, "fast"),  # which fetches in 1 s: 16 s
        (8.0, {"slow": (1.0, 0.0)}, "fast"),  # 16 s with all features to be computed
        (1.0, {"slow": (0.1, 0.0), "fast": (0.0, 0.0)}, "slow"),
    ],
)
def test_a_job_goes_to_its_features_when_the_saving_is_worth_it_and_not_otherwise(
    policy: str, speed: float, held: dict[str, tuple[float, float]], where: str
) -> None:
    nodes = [NodeView(id=NodeId("slow"), rates=RATES), NodeView(id=NodeId("fast"), rates=RATES.scaled(speed))]
    assert placed(nodes, held, policy).node == where


def test_waiting_jobs_hear_that_features_moved() -> None:
    made, known = Dispatcher(policy_named("vdf"), CostModel()), work(taught(having()))
    made.put_node(NodeView(id=A, rates=RATES, is_ready=False))
    made.add(job("t", work=known), 0.0)
    name = known.reuses or ""
    made.set_shares(name, {A: (0.0, 0.0)})
    made.decide(0.0)
    assert made.outlook(TaskId("t"), 0.0).service_s == pytest.approx(130.0)  # type: ignore[union-attr]
    made.set_shares(name, {A: (1.0, 0.0)})
    made.decide(0.0)
    why = made.outlook(TaskId("t"), 0.0)
    assert why is not None and why.service_s == pytest.approx(30.0)
    made.withdraw(TaskId("t"), 1.0)
    assert not made._books.nodes._shares, "nothing is kept of what nobody waits for"


def test_adapters_are_warm_as_before_beside_known_features() -> None:
    made = Dispatcher(policy_named("vdf"), CostModel())
    made.put_node(node("a"))
    poem = Work(n_tokens=10.0, n_adapter_loads=1.0, reuses="poet")
    known = work(taught(having()))
    made.add(job("t", work=known), 0.0)
    made.set_shares(known.reuses or "", {A: (0.25, 0.25)})
    made.add(job("p", work=poem), 0.0)
    assert starts(made.decide(0.0)) == {"p": "a"}
    made.ended(TaskId("p"), 1.1)
    made.add(job("q", work=poem), 1.1)
    (start, *_) = made.decide(1.1)
    assert isinstance(start, Start) and start.task == "q"
    assert start.why.service_s == pytest.approx(1.0), "no adapter load: it is there"


# ── the whole coordinator ───────────────────────────────────────────────────────────────────────────


def rated(world: World, **features_per_s: float) -> None:
    for name, tokens_per_s in features_per_s.items():
        rates = NodeRates(
            prefill_tokens_per_s=100.0, decode_tokens_per_s=10.0, row_cost=0.2,
            features_tokens_per_s=tokens_per_s, tune_tokens_per_s=1000.0,
        )  # fmt: skip
        world.say(replace(info(name), rates=rates, features_profile=PROFILE))


def telling(service_s: float = 130.0, held: FeaturesHeld = HELD) -> Callable[[Assign], Outcome]:
    """Outcomes that say so, and what they took."""
    return lambda assign: answer_of(assign, output=Output(features=held), service_s=service_s)


def submitted(world: World, name: str) -> tuple[str, Candidate]:
    """Submit a job on ``SPEC``; where it went, and the first candidate of that decision."""
    world.say(replace(submit(replace(SPEC, adapter=name)), id=TaskId(name)))
    world.run(0.1)
    (noted, *_) = world.scheduler.explanations.of(TaskId(name))
    assert isinstance(noted.decision, Start)
    return noted.decision.node, noted.decision.why.candidates[0]


def test_the_second_job_goes_where_the_catalogue_says_that_the_features_are_and_says_so() -> None:
    world = mesh(3, answer=telling(), claims=having(n2=slice(0, 32)))
    rated(world, n0=110.0, n1=100.0, n2=90.0)
    first, candidate = submitted(world, "one")
    assert (first, candidate.features) == ("n0", None), "nothing is known yet: the fastest"
    world.run(10.0)  # longer than an outcome alone is believed
    second, candidate = submitted(world, "two")
    assert second == "n2"
    assert candidate.features is not None and candidate.features.found == 10_000
    (noted, *_) = world.scheduler.explanations.of(TaskId("two"))
    assert isinstance(noted.decision, Start)
    assert "feature maps of 10,000 tokens are there" in noted.decision.why.words
    others = noted.decision.why.candidates[1:]
    assert {one.features.fetched for one in others if one.features} == {10_000}
    from coordinator.explanations import told

    rows = candidate_rows(told(noted, world.now))
    assert "features: 10,000 found" in rows[0][3] and "features: 10,000 fetched" in rows[1][3]
    world.run(5.0)
    assert world.states("two")[-1] == "done"


def test_a_job_that_waits_hears_what_one_like_it_left() -> None:
    world = mesh(1, answer=telling(), claims=having(n0=slice(0, 32)), slots=1)
    rated(world, n0=100.0)
    world.say(replace(submit(), id=TaskId("one")))
    world.run(0.1)
    world.say(replace(submit(replace(SPEC, adapter="two")), id=TaskId("two")))
    world.run(0.1)
    waiting = world.scheduler.outlook(TaskId("two"), world.now)
    assert waiting is not None and waiting.candidates[0].features is None
    world.run(0.4)
    (noted, *_) = world.scheduler.explanations.of(TaskId("two"))
    assert isinstance(noted.decision, Start) and noted.decision.why.candidates[0].features is not None
    world.run(5.0)
    assert world.states("two")[-1] == "done"


def test_a_lying_catalogue_costs_time_and_nothing_else() -> None:
    """Claims hold for nothing: jobs take as long as without features, and end all the same."""
    computed = replace(HELD, n_computed=10_000)
    world = mesh(2, answer=telling(held=computed), claims=lambda node, key: node == "n1", service_s=4.0)
    rated(world, n0=100.0, n1=100.0)
    expected_s = []
    for number in range(8):
        _, candidate = submitted(world, f"t{number}")
        expected_s.append(candidate.service_s)
        world.run(30.0)
        assert world.states(f"t{number}")[-1] == "done"
    assert expected_s[1] < 35.0, "all of it is claimed to be there"
    assert min(expected_s[-2:]) > 100.0, "what jobs take is believed, whatever is claimed"


@pytest.mark.parametrize("pause_s", [10.0, 1000.0])
def test_another_coordinator_knows_what_the_records_on_disks_say(pause_s: float) -> None:
    """They are kept for ten minutes; then it knows nothing until the next outcome."""
    world = mesh(3, answer=telling(), claims=having(n2=slice(0, 32)))
    rated(world, n0=110.0, n1=100.0, n2=90.0)
    submitted(world, "one")
    world.run(pause_s)
    world.elect("n1")
    world.run(1.0)
    where, candidate = submitted(world, "two")
    assert (where, candidate.features is not None) == (("n2", True) if pause_s < 600 else ("n0", False))
    world.run(10.0)
    assert submitted(world, "three")[1].features is not None


def test_features_that_nobody_trusts_never_reject_a_job_that_can_be_done() -> None:
    """30 s of training fit 40 s only with the features found: the door must know of them, too."""
    world = mesh(2, answer=telling(), claims=having(n1=slice(0, 32)), service_s=1.0)
    rated(world, n0=100.0, n1=100.0)
    submitted(world, "one")
    world.run(10.0)
    world.say(replace(submit(replace(SPEC, adapter="two")), id=TaskId("two"), deadline_s=40.0))
    world.run(0.1)
    assert "rejected" not in world.states("two")
    other = replace(SPEC, adapter="three", max_tokens=9)
    world.say(replace(submit(replace(other, data=SPEC.data * 40)), id=TaskId("three"), deadline_s=40.0))  # type: ignore[operator]
    world.run(0.1)
    assert world.states("three") == ["rejected"], "unknown features are computed"
