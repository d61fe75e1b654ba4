"""The state directory: slots between processes, durable records, and disks that do not play along."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from mesh.errors import ConfigError
from mesh.facts import BrokerRef
from mesh.ids import MeshName, NodeId
from mesh.transport.identity import MeshKey
from node import state as state_module
from node.state import KnownBroker, StateDir

HOME = MeshName("home")
KEY = MeshKey.create("home", bytes(range(32)))


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir(tmp_path / "state")


def broker(epoch: int = 3, host: str | None = "pi-1", **changes: object) -> BrokerRef:
    fields = {"epoch": epoch, "host": host, "addresses": ("10.0.0.1", "fe80::1"), "port": 8883} | changes
    return BrokerRef(**fields)  # type: ignore[arg-type]


def test_a_saved_key_comes_back_and_nobody_else_can_read_it(state: StateDir) -> None:
    assert state.mesh_key(HOME) is None
    state.save_key(KEY)
    assert state.mesh_key(HOME) == KEY
    file = state.path / "meshes" / "home" / "key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_damaged_key_says_what_to_do(state: StateDir) -> None:
    state.save_key(KEY)
    file = state.path / "meshes" / "home" / "key"
    file.write_text("em1-home-garbage\n")
    with pytest.raises(ConfigError, match="join again with --code") as caught:
        state.mesh_key(HOME)
    assert "garbage" not in str(caught.value)


def test_a_key_under_another_meshs_name_is_refused(state: StateDir) -> None:
    state.save_key(MeshKey.create("lab", bytes(32)))
    (state.path / "meshes" / "lab").rename(state.path / "meshes" / "home")
    with pytest.raises(ConfigError, match="holds the key of 'lab'"):
        state.mesh_key(HOME)


def test_the_default_mesh_is_the_only_one_known_else_home(state: StateDir) -> None:
    assert state.default_mesh() == "home"
    state.save_key(MeshKey.create("lab", bytes(32)))
    assert state.default_mesh() == "lab"
    state.save_key(MeshKey.create("office", bytes(32)))
    with pytest.raises(ConfigError, match=r"lab, office.*--mesh"):
        state.default_mesh()
    state.save_key(KEY)
    assert state.default_mesh() == "home"


def test_a_node_keeps_its_id_and_its_incarnation_grows_with_every_start(state: StateDir) -> None:
    with state.claim_node_slot(HOME, "Pi 4", Random(1)) as first:
        assert first.node.startswith("pi-4-")
        assert first.incarnation == 1
    with state.claim_node_slot(HOME, "renamed", Random(2)) as second:
        assert (second.node, second.incarnation) == (first.node, 2)


def test_an_incarnation_raised_while_running_is_exceeded_by_the_next_start(state: StateDir) -> None:
    with state.claim_node_slot(HOME, "pi", Random(1)) as slot:
        slot.record_incarnation(40)
        slot.record_incarnation(7)  # never back
        assert slot.incarnation == 40
    with state.claim_node_slot(HOME, "pi", Random(1)) as slot:
        assert slot.incarnation == 41


CLAIM = """
import sys
from random import SystemRandom
from pathlib import Path
from node.state import StateDir
slot = StateDir(Path(sys.argv[1])).claim_node_slot("home", "pi", SystemRandom())
print(slot.number, slot.node, slot.incarnation, flush=True)
sys.stdin.read()
"""


def claim(state: StateDir) -> tuple[subprocess.Popen[str], tuple[int, str, int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(state.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    number, node, incarnation = process.stdout.readline().split()
    return process, (int(number), node, int(incarnation))


def test_two_processes_never_share_a_slot_and_a_killed_ones_slot_is_free_again(state: StateDir) -> None:
    first, (number_a, node_a, incarnation_a) = claim(state)
    second, (number_b, node_b, _) = claim(state)
    try:
        assert (number_a, number_b) == (0, 1)
        assert node_a != node_b
        assert state.nodes_here(HOME) == [node_a, node_b]
        first.kill()
        first.communicate()
        assert state.nodes_here(HOME) == [node_b]
        third, again = claim(state)
        assert again == (0, node_a, incarnation_a + 1)
        third.communicate()
    finally:
        second.communicate()
    assert state.nodes_here(HOME) == []


def test_a_damaged_node_file_is_an_error_with_a_next_step_and_frees_the_slot(state: StateDir) -> None:
    with state.claim_node_slot(HOME, "pi", Random(1)) as slot:
        file = slot.path / "node.json"
    for content in ("", "[]", '{"id": "../x", "incarnation": 1}', '{"id": "pi-1"}'):
        file.write_text(content)
        with pytest.raises(ConfigError, match="starts as a new one"):
            state.claim_node_slot(HOME, "pi", Random(1))
    file.unlink()
    with state.claim_node_slot(HOME, "pi", Random(1)) as slot:
        assert slot.number == 0  # no failed claim kept the lock


def test_the_known_broker_comes_back_whole(state: StateDir) -> None:
    assert state.read_broker(HOME) is None
    for known in (
        KnownBroker(broker(), 1883),
        KnownBroker(broker(epoch=0, host=None, tls=False, username="me", password="pw")),
    ):
        state.write_broker(HOME, known)
        assert state.read_broker(HOME) == known
    file = state.path / "meshes" / "home" / "broker.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_node_that_does_not_host_the_broker_leaves_its_plain_port_known(state: StateDir) -> None:
    state.write_broker(HOME, KnownBroker(broker(), 1883))
    state.write_broker(HOME, KnownBroker(broker(), None))
    assert state.read_broker(HOME) == KnownBroker(broker(), 1883)
    state.write_broker(HOME, KnownBroker(broker(epoch=4), None))
    assert state.read_broker(HOME) == KnownBroker(broker(epoch=4), None)


def test_forgetting_a_broker_spares_a_newer_one(state: StateDir) -> None:
    state.write_broker(HOME, KnownBroker(broker(epoch=4)))
    state.forget_broker(HOME, broker(epoch=3))
    assert state.read_broker(HOME) is not None
    state.forget_broker(HOME, broker(epoch=4))
    assert state.read_broker(HOME) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"epoch": "x"}', '{"epoch": 1, "host": null}'])
def test_a_damaged_broker_hint_is_no_hint(state: StateDir, content: str) -> None:
    state.save_key(KEY)
    (state.path / "meshes" / "home" / "broker.json").write_text(content)
    assert state.read_broker(HOME) is None


def test_identities_are_issued_where_they_belong(state: StateDir) -> None:
    with state.claim_node_slot(HOME, "pi", Random(1)) as slot:
        assert slot.identity(KEY).cert_path.parent == slot.path
    client = state.client_identity(KEY, "shell")
    assert client.cert_path.parent == state.path / "meshes" / "home" / "clients" / "shell"
    with pytest.raises(ConfigError, match="client's name"):
        state.client_identity(KEY, "../../etc")


def test_a_file_in_the_way_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("not a directory")
    state = StateDir(tmp_path / "state")
    with pytest.raises(ConfigError, match="--state-dir"):
        state.save_key(KEY)
    with pytest.raises(ConfigError, match="--state-dir"):
        state.claim_node_slot(HOME, "pi", Random(1))


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "may not write")],
)
def test_a_disk_that_refuses_says_what_to_do_and_leaves_no_draft(
    state: StateDir, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    state.save_key(KEY)

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(state_module.os, "fsync", refuse)
    with pytest.raises(ConfigError, match=says):
        state.save_key(MeshKey.create("home", bytes(32)))
    assert state.mesh_key(HOME) == KEY  # the old one, whole
    assert os.listdir(state.path / "meshes" / "home") == ["key"]


def test_a_lock_left_by_a_dead_process_names_nobody(state: StateDir) -> None:
    with state.claim_node_slot(HOME, "pi", Random(1)) as slot:
        assert state.nodes_here(HOME) == [NodeId(slot.node)]
        lock = slot.path / "lock"
    lock.write_text("not a number")
    assert state.nodes_here(HOME) == []


def test_data_are_kept_under_their_digest_and_for_this_user_alone(tmp_path: Path) -> None:
    state = StateDir(tmp_path / "state")
    content = b'{"text": "hi", "label": "x"}\n'
    digest = state.keep_dataset(content)
    path = state.datasets_dir / f"{digest}.jsonl"
    assert digest == hashlib.sha256(content).hexdigest()
    assert path.read_bytes() == content and path.stat().st_mode & 0o777 == 0o600
    before = path.stat().st_ino
    assert state.keep_dataset(content) == digest and path.stat().st_ino == before
    assert [one.name for one in state.datasets_dir.iterdir()] == [path.name]


def test_the_data_longest_unused_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "DATASETS_BYTES_MAX", 250)
    state = StateDir(tmp_path / "state")
    digests = []
    for k in range(3):
        digests.append(state.keep_dataset(bytes([k]) * 100))
        os.utime(state.datasets_dir / f"{digests[-1]}.jsonl", (1000 + k, 1000 + k))
        if k == 1:
            state.keep_dataset(bytes([0]) * 100)  # used again: the second is the older one now
    assert {path.stem for path in state.datasets_dir.iterdir()} == {digests[0], digests[2]}
    alone = state.keep_dataset(b"x" * 1000)
    assert [path.stem for path in state.datasets_dir.iterdir()] == [alone], "the newest is always kept"


def test_data_that_cannot_be_kept_say_where_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "datasets").write_text("in the way")
    with pytest.raises(ConfigError, match=r"datasets.*--state-dir"):
        StateDir(tmp_path / "state").keep_dataset(b"{}")
