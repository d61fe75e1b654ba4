"""A node tunes from features that its peers have, even of another form than its own; never from a mixture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mesh.ids import TaskId
from mesh.messages import FeaturesHeld, Submit
from node.compute.assembly import FeatureMemory, model_engine
from node.compute.backbone.load import load_backbone
from node.compute.features.link import MeshLink
from node.compute.messages import Ended, Load, Run
from node.compute.tune.variants import Offer, Variant, cheapest
from tests.link_world import Peers, linked
from tests.tiny import tiny_llama
from tests.tuning import class_lines, kept_proof, spec

OWN, THEIRS = Variant("fp32 here"), Variant("bf16 there")


def offer(variant: Variant, share: float, fetch_s: float, compute_s: float = 100.0) -> Offer:
    return Offer(variant, variant.profile == OWN.profile, share, fetch_s, compute_s)


@pytest.mark.parametrize(
    ("own", "theirs", "chosen"),
    [
        (offer(OWN, 0.0, 0.0), offer(THEIRS, 1.0, 5.0), THEIRS),
        (offer(OWN, 1.0, 5.0), offer(THEIRS, 1.0, 4.9), OWN),  # hardly cheaper
        (offer(OWN, 0.0, 0.0), offer(THEIRS, 0.9, 5.0), OWN),  # what it lacks cannot be computed here
        (offer(OWN, 0.0, 0.0, 0.5), offer(THEIRS, 1.0, 0.01), OWN),  # half a second is no reason
        (offer(OWN, 0.0, 0.0), offer(THEIRS, 1.0, 90.0), OWN),  # peers are slow
        (offer(OWN, 0.9, 1.0), offer(THEIRS, 1.0, 1.0), THEIRS),  # ten seconds are left to compute
        (offer(OWN, 0.0, 0.0), offer(THEIRS, 1.0, math.inf), OWN),
    ],
)
def test_another_form_is_read_only_where_that_is_clearly_quicker(
    own: Offer, theirs: Offer, chosen: Variant
) -> None:
    assert cheapest([own, theirs]).variant == chosen


# ── the whole way ───────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"))


class Node:
    """A compute process's engine in this process."""

    def __init__(
        self, model: Path, work: Path, precision: str, link: MeshLink | None = None, **changes: Any
    ) -> None:
        self.load = Load(
            model="tiny",
            models_dir=str(work),
            adapters_dir=str(work / "adapters"),
            datasets_dir=str(work / "datasets"),
            features_dir=str(work / "features"),
            **{"feature_disk_bytes": 0, **changes},
        )
        backbone = load_backbone(model, precision=precision)
        self.memory = FeatureMemory(self.load, backbone, 1, link=link, proof=kept_proof(model, backbone))
        self.memory.choice.row_layer_s = 1.0  # as slow as fetching is worth waiting for
        self.engine = model_engine(self.load, ("tiny",), model, "f" * 64, backbone, 1, memory=self.memory)

    @property
    def profile(self) -> str:
        self.memory.proof.numerics()
        return self.memory.proof.profile or ""

    def begin(self, **changes: Any) -> None:
        wish = spec(**{"adapter": "a", "epochs": 2, **changes})
        self.engine.start(Run(task=TaskId("t-1"), attempt=1, submit=Submit(kind="tune", tune=wish)))

    def go(self, steps_max: int = 100_000) -> Ended | None:
        """So many steps, or to the end."""
        for _ in range(steps_max):
            for event in self.engine.step():
                if isinstance(event, Ended):
                    return event
        return None

    def tune(self, **changes: Any) -> Ended | None:
        self.begin(**changes)
        return self.go()

    def held(self) -> dict[bytes, bytes]:
        """All features in its memory, as peers would read them."""
        local = self.memory.store.local
        keys = list(local.catalogue().keys)
        return {
            key: bytes(entry.encoded.payload)
            for key, entry in zip(keys, local.get(keys), strict=True)
            if entry is not None
        }


def read(ended: Ended | None) -> tuple[str, FeaturesHeld]:
    """The adapter's digest, and what features it was made from."""
    assert ended is not None and ended.state == "done", ended
    assert ended.output is not None and ended.output.adapter is not None and ended.output.features is not None
    return ended.output.adapter.digest, ended.output.features


@pytest.fixture(scope="module")
def theirs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[bytes, bytes]]:
    """A peer of another precision: its profile, the digest of its adapter, and the features it has."""
    node = Node(model, tmp_path_factory.mktemp("theirs"), "bf16")
    digest, held = read(node.tune())
    assert held.n_computed == held.n_tokens and held.profile == node.profile
    return node.profile, digest, node.held()


@pytest.fixture(scope="module")
def own(model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the adapter from features computed here."""
    return read(Node(model, tmp_path_factory.mktemp("own"), "fp32").tune())[0]


def test_features_that_a_peer_computes_otherwise_are_read_as_a_whole(
    model: Path, tmp_path: Path, theirs: Any, own: str
) -> None:
    profile, digest, held = theirs
    peers = Peers(held, [profile])
    with linked(peers) as link:
        made, features = read(Node(model, tmp_path, "fp32", link).tune())
    assert made == digest != own, "the same adapter as the peer's, to the bit"
    assert features.profile == profile
    assert (features.n_fetched, features.n_computed) == (features.n_tokens, 0)


def test_what_turns_out_not_to_be_whole_is_computed_as_a_whole(
    model: Path, tmp_path: Path, theirs: Any, own: str
) -> None:
    profile, _, held = theirs
    lacking = set(list(held)[:3])
    peers = Peers({key: block for key, block in held.items() if key not in lacking}, [profile])
    peers.false_claims = lacking
    with linked(peers) as link:
        node = Node(model, tmp_path, "fp32", link)
        made, features = read(node.tune())
        assert features.profile == node.profile
    assert made == own, "as if no peer had anything"
    assert features.n_computed == features.n_tokens


def test_a_job_that_was_begun_in_one_form_goes_on_in_it(
    model: Path, tmp_path: Path, theirs: Any, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from node.compute.tune import job

    monkeypatch.setattr(job, "_CHECKPOINT_S", 0.0)
    profile, digest, held = theirs
    peers = Peers(held, [profile])
    with linked(peers) as link:
        begun = Node(model, tmp_path, "fp32", link)
        begun.begin()
        while not list((tmp_path / "features").rglob("*.safetensors")):
            assert begun.go(steps_max=1) is None
        # Another process: its own features would be as quick by now, and it does not even look.
        again = Node(model, tmp_path, "fp32", link)
        again.memory.choice.row_layer_s = 1e-9
        made, features = read(again.tune())
    assert (made, features.profile) == (digest, profile)


def test_a_codec_that_the_task_accepts_is_read_where_peers_have_it(model: Path, tmp_path: Path) -> None:
    """This node has room enough to keep features as they are; its peer has little, and rounds them."""
    wish = {"feature_error": 0.1, "data": class_lines(60, seed=5)}
    first = Node(model, tmp_path / "1", "fp32", feature_memory_bytes=300_000)
    digest, held = read(first.tune(**wish))
    assert held.codec == "int8"
    with linked(Peers(first.held())) as link:
        made, features = read(Node(model, tmp_path / "2", "fp32", link).tune(**wish))
    assert (made, features.codec, features.n_computed) == (digest, "int8", 0)
    assert read(Node(model, tmp_path / "3", "fp32").tune(**wish))[1].codec == "raw"
