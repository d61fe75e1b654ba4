"""One tuning task on a node that holds the top layers, in a process of its own: prints its peak memory in MB.

python -m tests.benchmarks.hold_top_memory N_TRAIN PLACE MADE

The engine is the one of ``edgemesh join --hold top``, with everything it has besides; feature maps are in
PLACE as peers would have sent them, and MADE is what the task that made them said (JSON).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mesh.ids import TaskId
from mesh.messages import FeaturesHeld, Submit, TuneSpec
from node.compute.messages import Ended, FeaturesGiven, Load, NeedFeatures, Run
from node.compute.models import read_manifest
from node.compute.top_assembly import top_engine
from node.profile import physical_cores
from tests.benchmarks.cached import prepared_model
from tests.benchmarks.datasets import load
from tests.benchmarks.tune_memory import peak_mb

__all__ = ["TOP_LAYERS", "load_in", "spec_of"]

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


def spec_of(n_train: int) -> TuneSpec:
    """One epoch on texts of R8, as the full LoRA of ``tune_memory`` trains."""
    split = load("r8", n_train=n_train, n_test=8)
    lines = [json.dumps({"text": item.text, "label": item.label}) for item in split.train]
    return TuneSpec(adapter="bench", data="\n".join(lines), top_layers=TOP_LAYERS, epochs=1, max_tokens=256)


def run(n_train: int, place: Path, made: FeaturesHeld) -> None:
    directory = prepared_model()
    manifest = read_manifest(directory)
    assert manifest is not None
    engine = top_engine(
        load_in(place), ["smollm2-135m"], directory, manifest.weights_sha256, "cpu", physical_cores()
    )
    task = TaskId("bench")
    events = engine.start(Run(task=task, attempt=1, submit=Submit(kind="tune", tune=spec_of(n_train))))
    while True:
        for event in events:
            if isinstance(event, NeedFeatures):
                engine.give(FeaturesGiven(task=task, attempt=1, round=event.round, made=made))
            elif isinstance(event, Ended):
                assert event.state == "done", event.reason
                return
        events = engine.step()


if __name__ == "__main__":
    run(int(sys.argv[1]), Path(sys.argv[2]), FeaturesHeld(**json.loads(sys.argv[3])))
    print(peak_mb())
