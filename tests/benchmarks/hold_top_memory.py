"""One tuning task on a node that holds the top layers, in a process of its own: prints its peak memory in MB.

python -m tests.benchmarks.hold_top_memory PLACE MADE

The engine is the one of ``edgemesh join --hold top``, with everything it has besides; feature maps are in
PLACE as peers would have sent them, with the records that the task brings; MADE is what the task that made
them said (JSON).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mesh.ids import TaskId
from mesh.messages import FeaturesHeld, Submit, TuneSpec
from node.compute.lean import leave_out_unused
from node.compute.messages import Ended, FeaturesGiven, Load, NeedFeatures, Run
from node.compute.models import read_manifest
from node.profile import physical_cores
from tests.benchmarks.datasets import load

__all__ = ["RECORDS", "TOP_LAYERS", "load_in", "records_of", "spec_of"]

RECORDS = "records.jsonl"

TOP_LAYERS = 4


def load_in(place: Path) -> Load:
    return Load(
        model="smollm2-135m",
        models_dir=str(place),
        adapters_dir=str(place / "adapters"),
        datasets_dir=str(place / "datasets"),
        features_dir=str(place / "features"),
        top_layers=TOP_LAYERS,
    )


def records_of(n_train: int) -> str:
    """Texts of R8, as the full LoRA of ``tune_memory`` trains on them."""
    split = load("r8", n_train=n_train, n_test=8)
    return "\n".join(json.dumps({"text": item.text, "label": item.label}) for item in split.train)


def spec_of(records: str) -> TuneSpec:
    return TuneSpec(adapter="bench", data=records, top_layers=TOP_LAYERS, epochs=1, max_tokens=256)


def run(place: Path, made: FeaturesHeld) -> None:
    leave_out_unused()  # as the compute process does, before anything brings transformers
    from node.compute.top_assembly import top_engine
    from tests.benchmarks.cached import prepared_model

    directory = prepared_model()
    manifest = read_manifest(directory)
    assert manifest is not None
    engine = top_engine(
        load_in(place), ["smollm2-135m"], directory, manifest.weights_sha256, "cpu", physical_cores()
    )
    assert not list((place / "adapters").glob("*/")), "an adapter that is there would not be trained again"
    task = TaskId("bench")
    submit = Submit(kind="tune", tune=spec_of((place / RECORDS).read_text()))
    events = engine.start(Run(task=task, attempt=1, submit=submit))
    while True:
        for event in events:
            if isinstance(event, NeedFeatures):
                engine.give(FeaturesGiven(task=task, attempt=1, round=event.round, made=made))
            elif isinstance(event, Ended):
                assert event.state == "done", event.reason
                return
        events = engine.step()


if __name__ == "__main__":
    run(Path(sys.argv[1]), FeaturesHeld(**json.loads(sys.argv[2])))
    from tests.benchmarks.tune_memory import peak_mb

    print(peak_mb())
