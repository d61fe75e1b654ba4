"""What a task asks for, what it takes on a node, and how estimates become better."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

import pytest

from coordinator.policy.cost import CostModel, Observed, step_share
from coordinator.policy.rates import PARTS, Rates, rates_of
from coordinator.policy.work import KINDS, Needs, Work, needs_of, work_of
from mesh.ids import NodeId
from mesh.messages import ChatMessage, NodeRates, Submit, TuneSpec
from tests.unit.task_world import info

A, B = NodeId("a"), NodeId("b")
RATES = Rates(
    prefill_tokens_per_s=100.0,
    decode_tokens_per_s=10.0,
    row_cost=0.2,
    features_tokens_per_s=200.0,
    tune_tokens_per_s=50.0,
    adapter_load_s=0.5,
)


# ── work ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("submit", "expected"),
    [
        (Submit(prompt="x" * 400, max_tokens=64), Work(n_prompt_tokens=100.0, n_tokens=64.0)),
        (
            Submit(messages=[ChatMessage(role="user", content="x" * 40)], adapter="poet", max_tokens=1),
            Work(n_prompt_tokens=10.0, n_tokens=1.0, n_adapter_loads=1.0, reuses="poet"),
        ),
        (
            Submit(kind="score", prompt="x" * 40, texts=["y" * 20, "z" * 20]),
            Work(kind="score", n_prompt_tokens=30.0),  # the prompt is read for each text
        ),
        (Submit(kind="embed", texts=["x" * 80]), Work(kind="embed", n_prompt_tokens=20.0)),
        (
            Submit(kind="tune", tune=TuneSpec(adapter="a", data="x" * 4000, epochs=3)),
            Work(kind="tune", n_feature_tokens=1000.0, n_tune_tokens=3000.0),
        ),
        (Submit(prompt="é" * 200, max_tokens=1), Work(n_prompt_tokens=100.0, n_tokens=1.0)),  # bytes
    ],
)
def test_work_counts_what_a_submission_asks_for(submit: Submit, expected: Work) -> None:
    assert work_of(submit) == expected


def test_needs_name_the_model_the_adapter_and_who_has_the_data() -> None:
    tune = TuneSpec(adapter="a", data_sha256="0" * 64, holders=[A])
    assert needs_of(Submit(kind="tune", tune=tune)) == Needs(holders=frozenset({A}))
    assert needs_of(Submit(prompt="hi", model="m", adapter="p")) == Needs("m", "p", whole=True)
    assert needs_of(Submit(kind="tune", tune=replace(tune, top_layers=2))).top_layers == 2


def test_a_tuning_job_goes_on_with_what_is_left_and_an_answer_reads_its_prompt_again() -> None:
    tune = Work(kind="tune", n_feature_tokens=10.0, n_tune_tokens=100.0)
    assert tune.left(0.25) == Work(kind="tune", n_tune_tokens=25.0)
    assert tune.left(1.0) == tune
    assert Work(n_prompt_tokens=9.0, n_tokens=8.0).left(0.5) == Work(n_prompt_tokens=9.0, n_tokens=4.0)


@pytest.mark.parametrize("amount", [-1.0, math.inf, math.nan])
def test_impossible_amounts_are_refused(amount: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        Work(n_tokens=amount)


# ── rates ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_node_that_says_nothing_is_guessed_by_its_device() -> None:
    assert not rates_of(info("a")).is_measured


def test_what_a_node_says_is_taken() -> None:
    said = NodeRates(
        prefill_tokens_per_s=96.0, decode_tokens_per_s=9.0, row_cost=0.3, emulated_slowdown=4.0, origin="busy"
    )
    node = info("a")
    rates = rates_of(type(node)(**{**{f: getattr(node, f) for f in node.__slots__}, "rates": said}))
    assert (rates.prefill_tokens_per_s, rates.decode_tokens_per_s, rates.row_cost) == (96.0, 9.0, 0.3)
    assert rates.is_measured and rates.emulated_slowdown == 4.0


@pytest.mark.parametrize("speed", [0.0, -1.0, math.inf, math.nan])
def test_impossible_rates_are_refused(speed: float) -> None:
    with pytest.raises(ValueError, match="rates must be positive"):
        Rates(decode_tokens_per_s=speed)


# ── estimates ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("work", "reuse", "rows", "parts"),
    [
        (Work(n_prompt_tokens=50.0, n_tokens=20.0), 0.0, 1.0, {"prefill": 0.5, "decode": 2.0}),
        (Work(n_prompt_tokens=50.0, n_tokens=20.0), 0.0, 6.0, {"prefill": 0.5, "decode": 4.0}),
        (Work(n_tokens=1.0, n_adapter_loads=1.0), 0.0, 1.0, {"adapter_load": 0.5, "decode": 0.1}),
        (Work(n_tokens=1.0, n_adapter_loads=1.0), 1.0, 1.0, {"decode": 0.1}),
        (
            Work(kind="tune", n_feature_tokens=100.0, n_tune_tokens=100.0),
            0.0,
            1.0,
            {"features": 0.5, "tune": 2.0},
        ),
        (
            Work(kind="tune", n_feature_tokens=100.0, n_tune_tokens=100.0),
            0.5,
            9.0,
            {"features": 0.25, "tune": 2.0},
        ),
    ],
)
def test_an_estimate_is_the_sum_of_its_parts(
    work: Work, reuse: float, rows: float, parts: dict[str, float]
) -> None:
    estimate = CostModel().estimate(work, A, RATES, reuse=reuse, rows=rows)
    assert {name: part for name, part in estimate.parts.items() if part} == pytest.approx(parts)
    assert set(estimate.parts) == set(PARTS)
    assert estimate.service_s == pytest.approx(sum(parts.values()))


def test_a_step_with_n_rows_takes_one_and_a_share_for_each_further() -> None:
    assert [step_share(rows, 0.25) for rows in (0, 1, 2, 5)] == [1.0, 1.0, 1.25, 2.0]


def test_nothing_takes_no_time_at_all() -> None:
    assert CostModel().estimate(Work(), A, RATES).service_s > 0


# ── lessons ─────────────────────────────────────────────────────────────────────────────────────────


def test_half_of_the_predictions_are_within_25_percent_after_20_tasks_of_a_kind() -> None:
    """A node 2.5 times slower than it said, and 30 % of noise that nobody can know."""
    for kind in KINDS:
        cost, rng = CostModel(), Random(7)
        errors = []
        for _ in range(60):
            work = Work(kind=kind, n_prompt_tokens=rng.uniform(10, 500), n_tokens=rng.uniform(1, 300))
            predicted_s = cost.estimate(work, A, RATES).service_s
            actual_s = 2.5 * CostModel().estimate(work, A, RATES).service_s * math.exp(rng.gauss(0, 0.3))
            errors.append(abs(actual_s / predicted_s - 1))
            cost.learn(work, A, RATES, Observed(service_s=actual_s))
        assert sorted(errors[20:])[20] <= 0.25 + 0.05, kind
        assert cost.correction(kind, A) == pytest.approx(2.5, rel=0.35)
        assert cost.errors()[kind].n == 60


def test_what_is_learned_of_one_kind_on_one_node_stays_there() -> None:
    cost = CostModel()
    cost.learn(Work(n_tokens=10.0), A, RATES, Observed(service_s=4.0))
    assert cost.correction("generate", A) == pytest.approx(4.0)
    assert cost.correction("embed", A) == 1.0
    cost.learn(Work(n_tokens=10.0), B, RATES, Observed(service_s=1.0))
    assert (cost.correction("generate", A), cost.correction("generate", B)) == pytest.approx((4.0, 1.0))


def test_a_node_that_has_not_done_a_kind_is_judged_by_those_that_have() -> None:
    cost = CostModel()
    cost.learn(Work(n_tokens=10.0), A, RATES, Observed(service_s=3.0))
    assert cost.correction("generate", B) == pytest.approx(3.0)


def test_a_longer_answer_than_expected_is_no_slower_node() -> None:
    cost = CostModel()
    cost.learn(Work(n_tokens=10.0), A, RATES, Observed(service_s=4.0, n_tokens=40))
    assert cost.correction("generate", A) == pytest.approx(1.0)
    assert cost.errors()["generate"].p50 == pytest.approx(3.0)  # the prediction was wrong all the same


def test_company_in_the_batch_is_no_slower_node() -> None:
    cost = CostModel()
    cost.learn(Work(n_tokens=10.0), A, RATES, Observed(service_s=2.0, rows=6.0))
    assert cost.correction("generate", A) == pytest.approx(1.0)


def test_a_guess_is_believed_after_three_outcomes_and_a_measure_at_once() -> None:
    cost, guess = CostModel(), Rates(is_measured=False)
    assert cost.is_known("generate", A, RATES)
    for n in range(4):
        assert cost.is_known("generate", A, guess) == (n >= 3)
        cost.learn(Work(n_tokens=10.0), A, guess, Observed(service_s=1.0))
    cost.forget(A)
    assert not cost.is_known("generate", A, guess)


def test_one_wild_outcome_does_not_make_estimates_impossible() -> None:
    cost = CostModel()
    for service_s in (0.0, 1e12):
        cost.learn(Work(n_tokens=10.0), A, RATES, Observed(service_s=service_s))
        assert 1e-4 < cost.correction("generate", A) < 1e4


def test_an_attempt_that_was_stopped_teaches_that_it_takes_longer_never_that_it_is_quick() -> None:
    cost, work = CostModel(), Work(kind="score", n_prompt_tokens=100.0)  # 1 s by its rates
    cost.learn(work, A, RATES, Observed(service_s=0.5, is_whole=False))
    assert cost.correction("score", A) == 1.0
    cost.learn(work, A, RATES, Observed(service_s=1.5, is_whole=False))
    assert cost.correction("score", A) == pytest.approx(1.5)
    cost.learn(work, B, RATES, Observed(service_s=1e6, is_whole=False))
    assert cost.correction("score", B) == pytest.approx(3.0), "twice what was expected: the node may be gone"
    assert cost.errors() == {}, "no prediction was proven wrong or right"


def test_an_answer_that_was_stopped_teaches_by_the_tokens_it_has() -> None:
    cost, work = CostModel(), Work(n_prompt_tokens=100.0, n_tokens=100.0)  # 1 s and 10 s by its rates
    cost.learn(work, A, RATES, Observed(service_s=4.0, n_tokens=10, is_whole=False))
    assert cost.correction("generate", A) == pytest.approx(2.0)


def test_what_answers_use_and_how_many_tokens_prompts_have_is_learned() -> None:
    cost = CostModel()
    assert cost.answer_share == 1.0
    for _ in range(20):
        cost.learn_answer(max_tokens=256, n_tokens=64)
        cost.counts.learn("generate", n_bytes=400, n_texts=1, n_tokens=120)
        cost.counts.learn("generate", n_bytes=40, n_texts=1, n_tokens=30)
    submit = Submit(prompt="x" * 200, max_tokens=400)
    work = work_of(submit, answer_share=cost.answer_share, counts=cost.counts)
    assert (work.n_prompt_tokens, work.n_tokens) == pytest.approx((70.0, 100.0), rel=0.02)


def test_errors_are_of_the_latest_outcomes_only() -> None:
    cost = CostModel()
    for _ in range(300):
        cost.learn(Work(n_tokens=10.0), A, RATES, Observed(service_s=1.0), predicted_s=2.0)
    assert cost.errors()["generate"].n == 256
    assert cost.errors()["generate"].p50 == 0.5
