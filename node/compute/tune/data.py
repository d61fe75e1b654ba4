"""Where a tuning task's records are: in the task itself, or in a file of this machine."""

from __future__ import annotations

from pathlib import Path

from mesh.errors import ConfigError
from mesh.messages import TuneSpec
from node.compute.tune.records import Records, read_file, read_records, same_labels

__all__ = ["records_of"]


def records_of(spec: TuneSpec, datasets_dir: Path | None) -> tuple[Records, Records | None]:
    """The records to learn from, and those that are never trained on. ``datasets_dir`` has files by SHA-256.

    Raises:
        ConfigError: They are not here, damaged, or no records for this task.
    """
    records = _read(spec, spec.data, spec.data_sha256, "the data", datasets_dir)
    held_out = None
    if spec.eval_data is not None or spec.eval_sha256 is not None:
        held_out = _read(spec, spec.eval_data, spec.eval_sha256, "the evaluation data", datasets_dir)
    same_labels(records, held_out or records)
    if held_out is not None and held_out.task == "classify":
        # A label has one number, whichever file it stands in.
        held_out.label_of.clear()
        held_out.label_of.update(records.label_of)
    return records, held_out


def _read(
    spec: TuneSpec, inline: str | None, sha256: str | None, name: str, datasets_dir: Path | None
) -> Records:
    if inline is not None:
        return read_records(inline, spec.task, skip_bad=spec.skip_bad, name=name)
    assert sha256 is not None, "the spec has checked it"
    path = datasets_dir / f"{sha256}.jsonl" if datasets_dir is not None else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"{name} ({sha256[:12]}…) is not on this node; submit where the file is, or send it along"
        )
    records = read_file(path, spec.task, skip_bad=spec.skip_bad)
    if records.sha256 != sha256:
        raise ConfigError(f"{path} is damaged: its content is not what its name says; copy it again")
    return records
