"""The house rules that a machine can check. Each failure names the rule and the line that broke it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = {"mesh": 0, "coordinator": 1, "node": 2}

OWNERS: dict[str, tuple[str, ...]] = {
    "aiohttp": ("mesh/transport/streams.py", "mesh/transport/bulk/server.py"),
    "aiomqtt": ("mesh/transport/mqtt.py",),
    "amqtt": ("mesh/brokers/amqtt_broker.py",),
    "blake3": ("mesh/digests.py",),
    "click": ("node/cli/",),
    "cryptography": ("mesh/transport/identity.py",),
    "ifaddr": ("mesh/transport/interfaces.py",),
    "matplotlib": ("node/faces/sim_plot.py",),
    "msgpack": ("mesh/wire.py",),
    "msgspec": ("mesh/wire.py",),
    "numpy": ("coordinator/policy/", "coordinator/virtual/", "mesh/cache/straws.py"),
    "paho": ("mesh/transport/mqtt.py",),
    "platformdirs": ("node/state.py",),
    "psutil": ("node/profile.py",),
    "rich": (
        "node/faces/tui.py",
        "node/faces/console.py",
        "node/faces/progress.py",
        "node/faces/sim_progress.py",
        "node/faces/sim_table.py",
    ),
    "sqlite3": ("mesh/journal.py",),
    "zeroconf": ("mesh/transport/discovery.py",),
}
"""One owner per third-party library: when it changes, one file changes."""

PURE = (
    *("mesh/core.py", "mesh/facts.py", "mesh/ids.py", "mesh/messages/", "mesh/agreement/", "mesh/cache/"),
    "coordinator/",
)
"""No I/O, no clock, no randomness of their own, no awaits: that is what makes them simulable."""

IMPURE = {
    "aiohttp", "asyncio", "os", "pathlib", "requests", "secrets", "select", "shutil", "signal", "socket",
    "sqlite3", "subprocess", "tempfile", "threading", "time", "urllib",
}  # fmt: skip

COMPUTE = {"torch", "transformers", "peft", "safetensors", "gguf"}
COMPUTE_FILES = ("node/compute/",)
WITHOUT_TORCH = tuple(
    f"node/compute/{name}.py"
    for name in (
        "__init__",
        "echo",
        "engine",
        "lean",
        "messages",
        "models",
        "outbox",
        "pace",
        "rate_watch",
        "rates",
        "threads",
        "tune/records",
        "adapters/card",
        "adapters/tensors",
        "backbone/precision",
        "features/__init__",
        "features/disk",
        "features/entry",
        "features/gdsf",
        "features/packs",
        "features/store",
        "features/key",
        "features/link",
    )
)
"""Files of the compute process that the node and the commands import, too: they start without torch."""


def sources() -> list[Path]:
    return [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def is_torch_free(path: Path) -> bool:
    return not name_of(path).startswith(COMPUTE_FILES) or name_of(path) in WITHOUT_TORCH


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full module name of every import in the file, deferred ones too."""
    for item in ast.walk(ast.parse(path.read_text())):
        if isinstance(item, ast.Import):
            yield from ((item.lineno, alias.name) for alias in item.names)
        elif isinstance(item, ast.ImportFrom) and item.module and not item.level:
            for alias in item.names:  # ``from package import module`` names the module, not the package
                inner = f"{item.module}.{alias.name}"
                is_module = (ROOT / inner.replace(".", "/")).with_suffix(".py").exists()
                yield item.lineno, inner if is_module else item.module


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_go_down_the_layers_only(path: Path) -> None:
    layer = name_of(path).split("/")[0]
    for line, module in imports(path):
        top = module.split(".")[0]
        if top in LAYERS:
            where = f"{name_of(path)}:{line}"
            assert LAYERS[top] <= LAYERS[layer], f"{where} imports {module}: {layer} is below {top}"


def test_no_two_files_import_each_other_even_by_detours() -> None:
    """Deferred imports count: a circle that works only because of its order is a circle."""
    modules = {module_of(path): path for path in sources()}
    needs = {
        name: {wanted for _, wanted in imports(path) if wanted in modules} - {name}
        for name, path in modules.items()
    }
    resolved: set[str] = set()
    while free := {name for name in needs if name not in resolved and needs[name] <= resolved}:
        resolved |= free
    circles = {name: sorted(needs[name] - resolved) for name in sorted(set(needs) - resolved)}
    assert not circles, f"these wait for each other: {circles}"


@pytest.mark.parametrize("library", sorted(OWNERS))
def test_each_library_has_one_owner(library: str) -> None:
    owners = OWNERS[library]
    for path in sources():
        for line, module in imports(path):
            if module.split(".")[0] == library:
                assert name_of(path).startswith(owners), (
                    f"{name_of(path)}:{line} imports {module}; only {' and '.join(owners)} may"
                )


@pytest.mark.parametrize("path", [p for p in sources() if name_of(p).startswith(PURE)], ids=name_of)
def test_cores_are_free_of_io_clock_and_randomness(path: Path) -> None:
    for line, module in imports(path):
        assert module.split(".")[0] not in IMPURE, f"{name_of(path)}:{line} imports {module}: cores are pure"
    tree = ast.parse(path.read_text())
    for item in ast.walk(tree):
        assert not isinstance(item, ast.AsyncFunctionDef | ast.Await), f"{name_of(path)}:{item.lineno} awaits"
        if isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name) and item.value.id == "random":
            raise AssertionError(f"{name_of(path)}:{item.lineno} uses the global random source; take an rng")


@pytest.mark.parametrize("path", [p for p in sources() if is_torch_free(p)], ids=name_of)
def test_only_compute_files_import_torch(path: Path) -> None:
    for line, module in imports(path):
        assert module.split(".")[0] not in COMPUTE, f"{name_of(path)}:{line} imports {module}"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_files_stay_small_enough_to_have_one_purpose(path: Path) -> None:
    n_lines = len(path.read_text().splitlines())
    assert n_lines <= 600, f"{name_of(path)} has {n_lines} lines: one purpose has become two, split it"


def test_nothing_unpickles() -> None:
    for path in sources():
        for line, module in imports(path):
            assert module.split(".")[0] not in {"pickle", "dill", "cloudpickle", "shelve", "marshal"}, (
                f"{name_of(path)}:{line}: bytes from peers must never become code"
            )
