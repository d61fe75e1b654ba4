"""A study gives the same whether its cases run one after the other or side by side."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from coordinator.policy.policies import policy_named
from coordinator.virtual.devices import nodes_of_speeds
from coordinator.virtual.generator import GeneratorSpec, generate
from coordinator.virtual.study import Study
from coordinator.virtual.traces import Request
from coordinator.virtual.workload import Mix
from node.simulating import runs_of


def study_of(n_tasks: int) -> Study:
    def draw(seed: int) -> list[Request]:
        return generate(GeneratorSpec(tasks=n_tasks), Random(f"requests/{seed}"))

    return Study(
        source=draw,
        mix=Mix(),
        meshes={"mesh": nodes_of_speeds([1.0, 2.0])},
        policies=[policy_named("foresight"), policy_named("fifo")],
        loads=[0.8, 1.2],
        seeds=[1, 2],
    )


def test_cases_side_by_side_give_what_they_give_one_after_the_other() -> None:
    told = {1: list[int](), 3: list[int]()}
    cells = {}
    for n_processes, said in told.items():
        study = study_of(60)
        cells[n_processes] = list(study.cells(runs_of(study, said.append, n_processes)))
    assert cells[1] == cells[3]
    assert len(cells[1]) == 4 and all(len(cell.runs) == 2 for cell in cells[1])
    assert sum(told[1]) == sum(told[3]) > 0, "progress counts every task once"


def test_what_is_wrong_with_a_study_is_said_from_any_process() -> None:
    study = study_of(60)
    study = replace(study, source=lambda seed: [Request(0.0, 10, 10)] * 5)
    with pytest.raises(ValueError, match="arrive"):
        list(runs_of(study, lambda n_tasks: None, 2))
