"""``sim``: the scheduler of the mesh on a mesh that does not exist yet."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import click

from mesh.errors import ConfigError
from node.cli.options import as_json

if TYPE_CHECKING:
    from coordinator.policy.policies import Policy
    from coordinator.virtual.devices import NodeSpec
    from coordinator.virtual.study import Cell, Source, Study
    from coordinator.virtual.traces import Request
    from coordinator.virtual.workload import Mix

__all__ = ["COMMANDS", "read_trace"]

_FORMATS = ("azure", "mooncake")
_FORMAT_OF_SUFFIX = {".csv": "azure", ".jsonl": "mooncake"}
_RULES = "+drop+chunk"
_SEEDS_MAX = 1000

_SAME_MESH = "mesh"


@click.command()
@click.option("--trace", type=click.Path(path_type=Path), metavar="FILE",
              help="Replay the times and lengths of these requests.")  # fmt: skip
@click.option("--format", "trace_format", type=click.Choice(_FORMATS),
              help="Of the trace [default: by the name of the file].")  # fmt: skip
@click.option("--generate", "generated", metavar="KEY=VALUE,...",
              help="Or draw requests: tasks=2000, rate=5.5, burstiness=1.2 (1 = Poisson), prompt_tokens, "
                   "answer_tokens; and all keys of --mix.")  # fmt: skip
@click.option("--mix", metavar="KEY=VALUE,...",
              help="What no trace has: values=1:0.6/3:0.3/10:0.1 (value:share), tightness=1.5..18 and "
                   "patience_s=2 (deadlines), tune=0.02 (share of tuning jobs), adapters=20, skew=1, "
                   "error=0.3 (of the estimates). See docs/scheduling.md.")  # fmt: skip
@click.option("--nodes", metavar="LIST",
              help="Relative speeds or devices, such as 3*pi5,orin [default: 1,1,0.5,6].")  # fmt: skip
@click.option("--mesh", "mesh_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Nodes from a TOML file of [[node]] tables.")  # fmt: skip
@click.option("--add", "added", multiple=True, metavar="LIST",
              help="Compare with the mesh that has these as well, under the same tasks.")  # fmt: skip
@click.option("--policy", "policies", default="default,vdf,fifo,edf+drop+chunk", show_default=True,
              metavar="NAMES",
              help="Policies to compare, each also with +drop, +chunk, +preempt; or 'all'.")  # fmt: skip
@click.option("--load", "loads", default="0.8,1.0,1.2", show_default=True, metavar="FACTORS",
              help="Offered work / what the mesh can do; 'recorded': at the trace's times.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1, _SEEDS_MAX), default=1, show_default=True, metavar="N",
              help="Independent runs; from 2 on with 95 % intervals.")  # fmt: skip
@click.option("--limit", type=click.IntRange(2), metavar="TASKS", help="Only so many, from the first.")
@click.option("--failover", "failover_every_s", type=click.FloatRange(3.0), metavar="SECONDS",
              help="The coordinator dies so often.")  # fmt: skip
@click.option("--jobs", "n_jobs", type=click.IntRange(1), metavar="N",
              help="Runs at once [default: one a core].")  # fmt: skip
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw timeouts and value, too (needs the extra 'plot').")  # fmt: skip
@as_json
def sim(is_json: bool, plot_file: Path | None, **options: Any) -> None:
    """Try scheduling policies and meshes on virtual time: "what if I add a Jetson?"

    The mesh's own scheduler decides; nodes and tasks are simulated. Same options, same output.

    \b
    edgemesh sim
    edgemesh sim --trace conv.csv --policy all --seeds 5 --plot policies.png
    edgemesh sim --nodes 3*pi5 --add orin --load 1.2
    """
    if plot_file is not None:
        from node.faces.sim_plot import require_matplotlib

        require_matplotlib()
    n_jobs = options.pop("n_jobs")
    study = _study(options)
    cells = _run(study, n_jobs)
    if is_json:
        click.echo(json.dumps(_plain(study, cells), indent=1))
    else:
        from node.faces.console import table_put
        from node.faces.sim_table import sim_table

        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        table_put(sim_table(cells, width))
    if plot_file is not None:
        from node.faces.sim_plot import plot

        plot(cells, _title(options, study), plot_file)


def _run(study: Study, n_jobs: int | None) -> list[Cell]:
    from node.faces.sim_progress import SimProgress
    from node.simulating import cores, runs_of

    n_runs = len(study.meshes) * len(study.loads) * len(study.policies)
    n_tasks = n_runs * sum(len(study.source(seed)) for seed in study.seeds)
    try:
        with SimProgress(n_tasks) as progress:
            return list(study.cells(runs_of(study, progress.went_on, n_jobs or cores())))
    except ValueError as error:
        raise ConfigError(str(error)) from error


# ── what was asked ──────────────────────────────────────────────────────────────────────────────────


def _study(options: Mapping[str, Any]) -> Study:
    from coordinator.virtual.study import Study

    source, mix = _workload(options)
    return Study(
        source=source,
        mix=mix,
        meshes=_meshes(options),
        policies=_policies(options["policies"]),
        loads=_loads(options["loads"]),
        seeds=range(1, options["seeds"] + 1),
        failover_every_s=options["failover_every_s"],
    )


def _workload(options: Mapping[str, Any]) -> tuple[Source, Mix]:
    from coordinator.virtual.generator import GeneratorSpec, generate
    from coordinator.virtual.specs import keys_of, made_from, parse_spec
    from coordinator.virtual.workload import Mix

    path, limit = options["trace"], options["limit"]
    if path is not None and options["generated"] is not None:
        raise ConfigError("give either --trace or --generate: what a trace lacks is described with --mix")
    try:
        found = parse_spec(options["mix"] or "", keys_of(Mix))
        if path is not None:
            requests = read_trace(path, options["trace_format"])[:limit]
            return (lambda seed: requests), made_from(Mix, found)
        if options["trace_format"] is not None:
            raise ConfigError("--format belongs to --trace")
        found |= parse_spec(options["generated"] or "", {**keys_of(GeneratorSpec), **keys_of(Mix)})
        spec, mix = made_from(GeneratorSpec, found), made_from(Mix, found)
    except ValueError as error:
        raise ConfigError(f"--generate or --mix: {error}") from error
    drawn: dict[int, Sequence[Request]] = {}

    def draw(seed: int) -> Sequence[Request]:
        if seed not in drawn:
            drawn[seed] = generate(spec, Random(f"requests/{seed}"))[:limit]
        return drawn[seed]

    return draw, mix


def read_trace(path: Path, trace_format: str | None = None) -> list[Request]:
    """A trace from a file; its format by its name where none is given.

    Raises:
        ConfigError: It cannot be read, or a line is not what it should be.
    """
    from coordinator.virtual.traces import READERS

    trace_format = trace_format or _FORMAT_OF_SUFFIX.get(path.suffix)
    if trace_format is None:
        raise ConfigError(f"say with --format {'|'.join(_FORMATS)} what {path} is")
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            requests = READERS[trace_format](lines, str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not text ({error.reason} at byte {error.start})") from error
    if len(requests) < 2:
        raise ConfigError(f"{path} has one request: a load needs at least two")
    return requests


def _meshes(options: Mapping[str, Any]) -> dict[str, tuple[NodeSpec, ...]]:
    from coordinator.virtual.devices import parse_nodes, read_mesh, together

    nodes, path = options["nodes"], options["mesh_file"]
    if nodes is not None and path is not None:
        raise ConfigError("give either --nodes or --mesh; --add takes more nodes beside either")
    if path is None:
        base = parse_nodes(nodes or "1,1,0.5,6")
    else:
        try:
            base = read_mesh(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise ConfigError(f"cannot read {path} ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not text ({error.reason} at byte {error.start})") from error
    meshes = {_SAME_MESH: base}
    for more in options["added"]:
        meshes[f"with {more}"] = together(base, parse_nodes(more))
    return meshes


def _policies(text: str) -> list[Policy]:
    from coordinator.policy.policies import DEFAULT_POLICY, POLICIES, policy_named

    names: list[str] = []
    for name in filter(None, (name.strip() for name in text.split(","))):
        if name != "all":
            names.append(DEFAULT_POLICY if name == "default" else name)
            continue
        names += POLICIES
        # Baselines also with the rules that part of the gain is due to.
        names += [f"{one}{_RULES}" for one, policy in POLICIES.items() if not (policy.drop and policy.chunk)]
    try:
        policies = [policy_named(name) for name in dict.fromkeys(names)]
    except ValueError as error:
        raise ConfigError(f"--policy: {error}") from error
    if not policies:
        raise ConfigError("--policy needs a name, such as vdf or all")
    return policies


def _loads(text: str) -> list[float | None]:
    loads: list[float | None] = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        try:
            loads.append(None if item == "recorded" else float(item))
        except ValueError:
            raise ConfigError(f"--load takes factors such as 0.8,1.2, or 'recorded', not {item!r}") from None
        if loads[-1] is not None and not 0.001 <= loads[-1] <= 1000:
            raise ConfigError(f"--load must be from 0.001 to 1000, got {item}")
    if not loads:
        raise ConfigError("--load needs a factor, such as 1.0")
    return list(dict.fromkeys(loads))


# ── what came out ───────────────────────────────────────────────────────────────────────────────────


def _title(options: Mapping[str, Any], study: Study) -> str:
    what = options["trace"].name if options["trace"] is not None else "generated requests"
    n_tasks = len(study.source(study.seeds[0]))
    seeds = f", {len(study.seeds)} seeds" if len(study.seeds) > 1 else ""
    return f"{what}: {n_tasks:,} tasks on {len(study.meshes[_SAME_MESH])} nodes{seeds}"


_METRICS = ("timeouts", "value_kept", "latency_p50_s", "latency_p95_s", "latency_p99_s", "utilization",
            "wasted", "late", "rejected", "expired", "pauses", "failovers")  # fmt: skip


def _plain(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "tasks": len(study.source(study.seeds[0])),
        "seeds": list(study.seeds),
        "mix": asdict(study.mix),
        "failover_every_s": study.failover_every_s,
        "meshes": {name: [node.id for node in nodes] for name, nodes in study.meshes.items()},
        "cells": [_plain_cell(cell) for cell in cells],
    }


def _plain_cell(cell: Cell) -> dict[str, Any]:
    means = {metric: cell.over_seeds(metric) for metric in _METRICS}
    kinds = sorted({kind for run in cell.runs for kind in run.timeouts_by_kind})
    return {
        "mesh": cell.mesh,
        "load": cell.load,
        "policy": cell.policy,
        **{metric: round(one.mean, 6) for metric, one in means.items()},
        "half_width_95": {metric: round(one.half, 6) for metric, one in means.items()},
        "timeouts_by_kind": {
            kind: round(_mean([run.timeouts_by_kind.get(kind, 0.0) for run in cell.runs]), 6)
            for kind in kinds
        },
        "busy_by_node": {
            node: round(_mean([run.busy[node] for run in cell.runs]), 6) for node in cell.runs[0].busy
        },
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


COMMANDS = (sim,)
