"""``edgemesh sim`` from its flags to its table, JSON and figure."""

from __future__ import annotations

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from coordinator.virtual.metrics import RunMetrics
from coordinator.virtual.study import Cell
from node.cli.main import cli
from node.faces.sim_table import sim_table

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--generate", "tasks=80", "--load", "1.0")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["sim", *arguments], prog_name="edgemesh")


def read(*arguments: str) -> dict[str, Any]:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def azure(tmp_path: Path) -> Path:
    path = tmp_path / "conv.csv"
    rows = [f"2023-11-16 18:15:{k // 2:02d}.{5 * (k % 2)}00000,{100 + k},{10 + k}" for k in range(100)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows, ""]))
    return path


@pytest.fixture
def mooncake(tmp_path: Path) -> Path:
    path = tmp_path / "conv.jsonl"
    lines = [
        {"timestamp": 900 * k, "input_length": 500, "output_length": 9, "hash_ids": [k]} for k in range(60)
    ]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_the_table_has_every_policy_at_every_load(azure: Path) -> None:
    done = invoke("--trace", str(azure), "--policy", "vdf,fifo", "--load", "0.8,1.2")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["load", "policy", "timeouts"]
    assert [line.split()[0] for line in lines[1:]] == ["0.8", "fifo", "1.2", "fifo"]
    assert "400 tasks in" in done.stderr


def test_the_same_options_give_the_same_bytes_in_another_process(azure: Path, tmp_path: Path) -> None:
    figure = tmp_path / "p.png"
    command = [sys.executable, "-m", "node", "sim", "--trace", str(azure), "--seeds", "2", "--load", "1.1",
               "--failover", "20", "--plot", str(figure), "--json"]  # fmt: skip
    outputs = []
    for _ in range(2):
        stdout = subprocess.run(command, capture_output=True, check=True, cwd=ROOT).stdout
        outputs.append((stdout, figure.read_bytes()))
    assert outputs[0] == outputs[1]
    assert json.loads(outputs[0][0])["cells"][0]["failovers"] > 0


def test_a_trace_is_known_by_its_name_or_by_format(azure: Path, mooncake: Path, tmp_path: Path) -> None:
    assert read("--trace", str(mooncake), "--load", "1")["tasks"] == 60
    other = tmp_path / "trace.txt"
    other.write_bytes(azure.read_bytes())
    assert invoke("--trace", str(other)).exit_code == 2
    assert read("--trace", str(other), "--format", "azure", "--load", "1", "--limit", "30")["tasks"] == 30


def test_all_means_every_policy_and_every_baseline_with_drop_and_chunk() -> None:
    names = [
        cell["policy"] for cell in read("--generate", "tasks=12", "--load", "1.0", "--policy", "all")["cells"]
    ]
    assert {"vdf", "fifo", "fifo+drop+chunk", "edf", "edf+drop+chunk", "llf+drop+chunk"} <= set(names)
    assert "vdf+drop+chunk" not in names
    assert len(names) == len(set(names))


def test_what_if_i_add_a_jetson() -> None:
    """The same tasks at the same times; the mesh with one more node misses fewer."""
    found = read(
        "--generate", "tasks=150", "--nodes", "3*pi5", "--add", "orin", "--load", "1.5", "--policy", "vdf"
    )
    without, with_orin = found["cells"]
    assert (without["mesh"], with_orin["mesh"]) == ("mesh", "with orin")
    assert found["meshes"]["with orin"] == ["pi5-1", "pi5-2", "pi5-3", "orin-1"]
    assert with_orin["timeouts"] < without["timeouts"]
    assert set(with_orin["busy_by_node"]) == set(found["meshes"]["with orin"])


def test_a_mesh_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "home.toml"
    path.write_text(
        '[[node]]\ndevice = "pi5"\ncount = 3\n[[node]]\ndevice = "orin"\n[[node]]\ndevice = "gpu-server"\n'
    )
    found = read("--mesh", str(path), *SMALL, "--policy", "vdf")
    assert found["meshes"]["mesh"] == ["pi5-1", "pi5-2", "pi5-3", "orin-1", "gpu-server-1"]


def test_recorded_keeps_the_times_of_the_trace(azure: Path) -> None:
    found = read("--trace", str(azure), "--load", "recorded", "--policy", "fifo")
    assert found["cells"][0]["load"] is None


def test_seeds_give_intervals_that_are_not_nothing() -> None:
    (cell,) = read(*SMALL, "--seeds", "3", "--policy", "fifo")["cells"]
    assert cell["half_width_95"]["timeouts"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--trace", "nowhere.csv"), "cannot read nowhere.csv"),
        (("--trace", "x.csv", "--generate", "tasks=3"), "either --trace or --generate"),
        (("--generate", "colour=red"), "tasks, rate"),
        (("--generate", "tasks=0"), "tasks must be"),
        (("--mix", "tune=7"), "tune must be"),
        (("--mix", "values=1"), "values must look like"),
        (("--nodes", "toaster"), "devices: pi4"),
        (("--nodes", "1", "--mesh", "m.toml"), "either --nodes or --mesh"),
        (("--mesh", "nowhere.toml"), "cannot read nowhere.toml"),
        (("--policy", "magic"), "there are vdf"),
        (("--policy", ""), "needs a name"),
        (("--load", "heavy"), "heavy"),
        (("--load", "0"), "--load must be"),
        (("--load", "nan"), "--load must be"),
        (("--format", "azure"), "--format belongs to --trace"),
        (("--seeds", "0"), "--seeds"),
        (("--limit", "1"), "--limit"),
    ],
)
def test_a_wrong_flag_says_what_is_right(arguments: tuple[str, ...], words: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_damaged_trace_is_refused_with_its_line(azure: Path) -> None:
    azure.write_text(azure.read_text() + "2023-11-16 18:16")
    done = invoke("--trace", str(azure))
    assert done.exit_code == 2
    assert "line 102" in done.stderr
    assert "expected TIMESTAMP,ContextTokens,GeneratedTokens" in done.stderr


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"TIMESTAMP,ContextTokens,GeneratedTokens\n"])
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    done = invoke("--trace", str(path))
    assert done.exit_code == 2
    assert str(path) in done.stderr


# ── the figure ──────────────────────────────────────────────────────────────────────────────────────


def test_the_figure_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    done = invoke(*SMALL, "--seeds", "2", "--policy", "vdf,fifo,fifo+drop", "--plot", str(path))
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["p.nonsense", "nowhere/p.png"])
def test_a_figure_that_cannot_be_written_is_an_error_with_its_reason(tmp_path: Path, name: str) -> None:
    done = invoke(*SMALL, "--policy", "fifo", "--plot", str(tmp_path / name))
    assert done.exit_code == 2
    assert "cannot write the figure" in done.stderr


def test_without_matplotlib_it_says_how_to_install_it_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where the extra is not installed
    done = invoke(*SMALL, "--plot", str(tmp_path / "p.png"))
    assert done.exit_code == 2
    assert "pip install 'edgemesh[plot]'" in done.stderr
    assert "tasks in" not in done.stderr


# ── the table ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("width", [80, 100, 240])
def test_a_narrow_terminal_gets_fewer_columns_and_no_cut_ones(width: int) -> None:
    cells = [
        Cell(mesh=mesh, load=load, policy=policy, runs=(_run_metrics(0.1), _run_metrics(0.3)))
        for mesh in ("mesh", "with orin")
        for load in (0.8, None)
        for policy in ("vdf", "vdf-plain+drop+chunk")
    ]
    console = Console(width=width, file=StringIO(), record=True)
    console.print(sim_table(cells, width))
    text = console.export_text()
    assert "…" not in text
    assert "20.0% ±127.1" in text
    assert "as recorded" in text
    assert ("in vain" in text) == (width == 240)


def _run_metrics(timeouts: float) -> RunMetrics:
    return RunMetrics(
        n_tasks=10, timeouts=timeouts, value_kept=1 - timeouts, latency_p50_s=1.0, latency_p95_s=2.0,
        latency_p99_s=3.0, utilization=0.5, wasted=0.1, late=0.0, rejected=timeouts, expired=0.0, pauses=0,
        failovers=0, busy={"n": 0.5}, timeouts_by_kind={"generate": timeouts},
    )  # fmt: skip
