"""Workloads and meshes of the simulator: drawn by seed, scaled to a load, refused with the reason."""

from __future__ import annotations

from random import Random

import pytest

from coordinator.policy.rates import Rates
from coordinator.policy.work import Work
from coordinator.virtual.devices import DEVICES, UNIT, NodeSpec, parse_nodes, read_mesh, together
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.specs import keys_of, made_from, parse_spec
from coordinator.virtual.traces import Request
from coordinator.virtual.workload import Mix, VirtualTask, at_load, offered_load, service_s, tasks_of
from mesh.errors import ConfigError
from mesh.ids import NodeId

NODES = parse_nodes("1,1,0.5,6")
REQUESTS = generate(GeneratorSpec(tasks=3000), Random(1))


def drawn(mix: Mix | None = None, seed: int = 1) -> list[VirtualTask]:
    return tasks_of(REQUESTS, mix or Mix(), seed, NODES)


# ── tasks ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_seed_draws_the_same_tasks_and_another_seed_others() -> None:
    assert drawn(seed=1) == drawn(seed=1)
    assert drawn(seed=1) != drawn(seed=2)


def test_a_shorter_run_has_the_same_first_tasks() -> None:
    assert tasks_of(REQUESTS[:100], Mix(), 1, NODES) == drawn()[:100]


def test_changing_one_share_leaves_the_other_draws_alone() -> None:
    mine = [task.value for task in drawn(Mix(tune=0.0))]
    assert mine == [task.value for task in drawn(Mix(tune=0.0, adapters=3, error=0.0))]


def test_shares_and_values_are_what_the_mix_says() -> None:
    tasks = drawn(Mix(tune=0.1, values=((1.0, 0.75), (4.0, 0.25)), tune_value=1.0))
    assert sum(task.work.kind == "tune" for task in tasks) / len(tasks) == pytest.approx(0.1, abs=0.02)
    assert {task.value for task in tasks} == {1.0, 4.0}
    assert sum(task.value == 4.0 for task in tasks) / len(tasks) == pytest.approx(0.25, abs=0.03)


def test_adapters_are_used_by_a_power_law() -> None:
    names = [task.work.reuses for task in drawn(Mix(tune=0.0, adapters=4, skew=1.0))]
    counts = [names.count(f"adapter-{k}") for k in (1, 2, 3, 4)]
    assert counts[0] / counts[1] == pytest.approx(2.0, rel=0.2)
    assert counts[0] / counts[3] == pytest.approx(4.0, rel=0.3)
    assert sum(counts) == len(names)


def test_without_adapters_nothing_has_to_be_loaded() -> None:
    assert all(task.work.n_adapter_loads == 0.0 for task in drawn(Mix(adapters=0)))


def test_the_truth_is_as_far_off_as_the_mix_says_and_right_on_average() -> None:
    factors = [task.true_factor for task in drawn(Mix(error=0.3))]
    assert sum(factors) / len(factors) == pytest.approx(1.0, abs=0.02)
    assert sorted(factors)[int(0.84 * len(factors))] == pytest.approx(2.718**0.3, rel=0.07)
    assert {task.true_factor for task in drawn(Mix(error=0.0))} == {1.0}


def test_every_task_could_be_done_in_time_by_the_best_node_alone() -> None:
    for task in drawn():
        assert min(service_s(task.work, node.rates) for node in NODES) < task.deadline_at - task.arrives_at


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": ((1.0, 0.5),)},
        {"values": ((0.0, 1.0),)},
        {"tune": 2.0},
        {"tightness": (3.0, 1.0)},
        {"error": -1.0},
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|sum"):
        Mix(**wrong)  # type: ignore[arg-type]


# ── load ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("load", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("nodes", ["1,1,0.5,6", "3*pi5,orin"])
def test_a_trace_is_stretched_to_the_load_and_every_task_keeps_its_time(load: float, nodes: str) -> None:
    mesh = parse_nodes(nodes)
    before = drawn()
    after = at_load(before, mesh, load)
    assert offered_load(after, mesh) == pytest.approx(load)
    for one, two in zip(before, after, strict=True):
        assert two.deadline_at - two.arrives_at == pytest.approx(one.deadline_at - one.arrives_at)


def test_a_load_of_one_is_the_work_the_nodes_can_do_while_it_arrives() -> None:
    request = Request(0.0, 200, 20)  # 2 s on the unit node, which reads 200 and writes 20 tokens a second
    requests = [Request(float(k), request.n_prompt_tokens, request.n_tokens) for k in range(101)]
    tasks = tasks_of(requests, Mix(tune=0.0, adapters=0), 1, NODES)
    assert offered_load(tasks, parse_nodes("2")) == pytest.approx(101 / 100)
    assert offered_load(tasks, parse_nodes("1,1")) == pytest.approx(101 / 100)


def test_a_node_that_leaves_half_way_is_half_a_node() -> None:
    tasks = drawn()
    span_s = tasks[-1].arrives_at
    half = NodeSpec(id=NodeId("half"), rates=UNIT, leaves_at=span_s / 2)
    whole = NodeSpec(id=NodeId("whole"), rates=UNIT)
    assert offered_load(tasks, [half]) == pytest.approx(2 * offered_load(tasks, [whole]))


def test_tasks_of_one_instant_have_no_load() -> None:
    tasks = tasks_of([Request(0.0, 10, 10)] * 3, Mix(), 1, NODES)
    with pytest.raises(ValueError, match="over a length of time"):
        at_load(tasks, NODES, 1.0)


# ── meshes ──────────────────────────────────────────────────────────────────────────────────────────

HOME = """
[[node]]
device = "pi5"
count = 3

[[node]]
device = "orin"
name = "garage"
speed = 0.5
slots = 2

[[node]]
name = "attic"
prefill_tokens_per_s = 300
decode_tokens_per_s = 25
joins_at_s = 60
leaves_at_s = 600
"""


def test_a_toml_file_describes_devices_and_nodes_of_ones_own() -> None:
    nodes = read_mesh(HOME, "home.toml")
    assert [node.id for node in nodes] == ["pi5-1", "pi5-2", "pi5-3", "garage", "attic"]
    garage, attic = nodes[3:]
    assert garage.rates == DEVICES["orin"].rates.scaled(0.5)
    assert garage.slots == 2
    assert (attic.rates.prefill_tokens_per_s, attic.rates.decode_tokens_per_s) == (300.0, 25.0)
    assert (attic.slots, attic.joins_at, attic.leaves_at) == (1, 60.0, 600.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "[[node]]"),
        ("nodes = 3", "[[node]]"),
        ("[[node]", "home.toml"),
        ('[[node]]\ndevice = "toaster"', "there are pi4, pi5"),
        ("[[node]]\nslots = 2", "prefill_tokens_per_s and decode_tokens_per_s"),
        ('[[node]]\ndevice = "pi5"\ncolour = "red"', "unknown key 'colour'"),
        ('[[node]]\ndevice = "pi5"\ncount = 0', "count must be"),
        ('[[node]]\ndevice = "pi5"\nslots = true', "slots must be"),
        ('[[node]]\ndevice = "pi5"\nspeed = -1', "speed must be"),
        ('[[node]]\ndevice = "pi5"\nspeed = "fast"', "speed must be a number"),
        ('[[node]]\ndevice = "pi5"\njoins_at_s = 9\nleaves_at_s = 3', "must join"),
        ('[[node]]\ndevice = "pi5"\ndecode_tokens_per_s = 0', "number 1"),
        ('[[node]]\ndevice = "pi5"\nname = "A b"', "name must be"),
        ('[[node]]\ndevice = "pi5"\nname = "a"\n[[node]]\ndevice = "pi5"\nname = "a"', "called a"),
        ('[[node]]\ndevice = "pi5"\ncount = 999999', "count must be"),
    ],
)
def test_a_wrong_mesh_file_is_refused_with_the_table_and_the_reason(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_mesh(text, "home.toml")
    assert words in str(caught.value)
    assert "home.toml" in str(caught.value)


def test_nodes_are_speeds_or_devices() -> None:
    nodes = parse_nodes("1, 0.5,2*pi5,orin,2*3")
    assert [node.id for node in nodes] == ["n1", "n2", "pi5-1", "pi5-2", "orin-1", "n6", "n7"]
    assert nodes[1].rates == UNIT.scaled(0.5)
    assert nodes[1].slots == 1
    assert nodes[2].slots == DEVICES["pi5"].slots


@pytest.mark.parametrize("text", ["", "fast", "0", "-1", "nan", "inf", "0*pi5", "x*pi5", "1e9"])
def test_wrong_nodes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_nodes(text)


def test_added_nodes_get_names_of_their_own() -> None:
    both = together(parse_nodes("1,2"), parse_nodes("3"))
    assert [node.id for node in both] == ["n1", "n2", "n1-added"]


def test_service_is_the_sum_of_the_parts() -> None:
    work = Work(n_prompt_tokens=400, n_tokens=10, n_adapter_loads=1.0)
    rates = Rates(prefill_tokens_per_s=200, decode_tokens_per_s=20, adapter_load_s=0.25)
    assert service_s(work, rates) == pytest.approx(0.25 + 2.0 + 0.5)


# ── descriptions on one line ────────────────────────────────────────────────────────────────────────


def test_a_line_of_keys_and_values_becomes_a_mix() -> None:
    found = parse_spec("tune=0.1, tightness=2..4,values=1:0.5/8:0.5,tune_epochs=2", keys_of(Mix))
    mix = made_from(Mix, found)
    assert (mix.tune, mix.tightness, mix.tune_epochs) == (0.1, (2.0, 4.0), 2)
    assert mix.values == ((1.0, 0.5), (8.0, 0.5))


@pytest.mark.parametrize(
    "text", ["tune", "tune=", "tune=x", "colour=1", "tune=1,tune=2", "values=1", "tune_epochs=1.5"]
)
def test_a_wrong_line_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"KEY=VALUE|twice|must look like"):
        parse_spec(text, keys_of(Mix))
