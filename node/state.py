"""What this machine remembers, as files.

    <state>/meshes/<mesh>/key             join code, mode 0600
                          broker.json     the broker last known here; mode 0600
                          nodes/<k>/      slot k: one node process at a time
                              lock        flock held for the process's life
                              node.json   {id, incarnation}
                              journal.db  mesh.journal
                              features/   its share of the mesh's memory: may be removed at any time
                              *.pem       its certificate
                          clients/<name>/ certificates issued to people and scripts
           models/                        weights, shared by all meshes
           adapters/<name>/               adapters trained or put here, as ``peft`` writes them
           datasets/<sha256>.jsonl        tuning data too large to travel with their task
           features/                      checkpoints of tuning: may be removed at any time

Several processes on one machine share the directory: a slot belongs to whoever holds its lock, and
``flock`` lets go when the process dies, however it dies. Files that matter are written beside their
name, synced and renamed, so a reader or a power cut sees the old one or the new one.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Any

from platformdirs import user_config_path, user_state_path

from mesh.errors import ConfigError
from mesh.facts import BrokerRef
from mesh.ids import MeshName, NodeId, is_id, new_node_id
from mesh.units import GIB
from node.durable import write_durably

if TYPE_CHECKING:
    from mesh.transport.identity import Identity, MeshKey

__all__ = ["DEFAULT_MESH", "KnownBroker", "NodeSlot", "StateDir", "default_config_file", "default_state_dir"]

DEFAULT_MESH = MeshName("home")
SLOTS_MAX = 256  # nodes of one mesh on one machine; a laptop runs out of memory long before
DATASETS_BYTES_MAX = 2 * GIB  # eight of the largest that are tuned on
RECORD_BYTES_MAX = 64 * 1024  # the largest is broker.json with 16 addresses, under 1 KiB


def default_state_dir() -> Path:
    """Such as ``~/.local/state/edgemesh``."""
    return user_state_path("edgemesh", appauthor=False)


def default_config_file() -> Path:
    """Such as ``~/.config/edgemesh/config.toml``."""
    return user_config_path("edgemesh", appauthor=False) / "config.toml"


@dataclass(frozen=True, slots=True)
class KnownBroker:
    """A broker that served this machine, and its unencrypted loopback port if it is on this machine."""

    ref: BrokerRef
    plain_port: int | None = None

    def names(self, ref: BrokerRef) -> bool:
        """Whether it is this broker, whatever its addresses are now."""
        return (self.ref.epoch, self.ref.host) == (ref.epoch, ref.host)


class NodeSlot:
    """One node's own directory, held until ``close``; a context manager.

    ``incarnation`` is already durable and higher than any this node has used before.
    """

    def __init__(self, path: Path, number: int, lock: int, node: NodeId, incarnation: int) -> None:
        self.path = path
        self.number = number
        self.node = node
        self.incarnation = incarnation
        self._lock: int | None = lock

    @property
    def journal_path(self) -> Path:
        return self.path / "journal.db"

    @property
    def features_dir(self) -> Path:
        """This node's share of the mesh's memory: two nodes of one machine are two shares."""
        return self.path / "features"

    def identity(self, key: MeshKey) -> Identity:
        """This node's certificate in its slot, issued if it is not there yet.

        Raises:
            ConfigError: The directory cannot be written.
        """
        from mesh.transport.identity import issue

        return issue(key, self.node, self.path)

    def record_incarnation(self, incarnation: int) -> None:
        """Durable on return: the node refuted a rumour, and its next life must start above this.

        Raises:
            ConfigError: The directory cannot be written.
        """
        if incarnation > self.incarnation:
            with _readable_errors(self.path):
                _write(self.path / "node.json", {"id": self.node, "incarnation": incarnation})
            self.incarnation = incarnation

    def close(self) -> None:
        """Let another process have the slot."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> NodeSlot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StateDir:
    """The directory and everything in it. Nothing is created before something is saved."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # ── meshes and their keys ───────────────────────────────────────────────────────────────────────

    def meshes(self) -> list[MeshName]:
        """Meshes whose key is here, by name."""
        with _readable_errors(self.path):
            folders = sorted((self.path / "meshes").glob("*/key"))
        return [MeshName(key.parent.name) for key in folders if is_id(key.parent.name)]

    def default_mesh(self) -> MeshName:
        """The only mesh known here; ``home`` when there is none.

        Raises:
            ConfigError: Several: the operator must choose.
        """
        names = self.meshes()
        if len(names) > 1 and DEFAULT_MESH not in names:
            raise ConfigError(f"several meshes are known here ({', '.join(names)}): choose one with --mesh")
        return names[0] if len(names) == 1 else DEFAULT_MESH

    def mesh_key(self, mesh: MeshName) -> MeshKey | None:
        """The key saved for ``mesh``.

        Raises:
            ConfigError: The file is damaged or cannot be read.
        """
        from mesh.transport.identity import MeshKey

        path = self._mesh(mesh) / "key"
        with _readable_errors(path):
            try:
                code = path.read_text().strip()
            except FileNotFoundError:
                return None
        try:
            key = MeshKey.from_code(code)
        except ConfigError as error:
            raise ConfigError(f"{path} is damaged ({error}): remove it and join again with --code") from error
        if key.name != mesh:
            raise ConfigError(f"{path} holds the key of '{key.name}': remove it and join again with --code")
        return key

    def save_key(self, key: MeshKey) -> None:
        """Durable and readable by this user only, on return.

        Raises:
            ConfigError: The directory cannot be written.
        """
        path = self._mesh(key.name) / "key"
        with _readable_errors(path):
            _make_dir(path.parent)
            write_durably(path, f"{key.code}\n".encode())

    # ── nodes ───────────────────────────────────────────────────────────────────────────────────────

    def claim_node_slot(self, mesh: MeshName, hostname: str, rng: Random) -> NodeSlot:
        """The first slot no living process holds; a new node if all known ones are running.

        Args:
            mesh: Whose node.
            hostname: Readable part of a new node's id.
            rng: Draws a new node's id.

        Raises:
            ConfigError: The directory cannot be written, a file in it is damaged, or 256 nodes run here.
        """
        for number in range(SLOTS_MAX):
            path = self._mesh(mesh) / "nodes" / str(number)
            with _readable_errors(path):
                _make_dir(path)
                lock = _try_lock(path / "lock")
                if lock is None:
                    continue
                try:
                    node, incarnation = self._next_life(path / "node.json", hostname, rng)
                except BaseException:
                    os.close(lock)
                    raise
            return NodeSlot(path, number, lock, node, incarnation)
        raise ConfigError(f"{SLOTS_MAX} nodes of mesh '{mesh}' already run on this machine: stop one first")

    def shares_here(self, mesh: MeshName) -> dict[NodeId, Path]:
        """Where the nodes of ``mesh`` on this machine, running or not, keep their share of its memory.

        Raises:
            ConfigError: A file is damaged, or cannot be read.
        """
        found = {}
        for path in sorted((self._mesh(mesh) / "nodes").glob("*/node.json")):
            with _readable_errors(path):
                record = _read(path)
            if record is not None and (directory := path.parent / "features").is_dir():
                found[NodeId(str(record["id"]))] = directory
        return found

    def nodes_here(self, mesh: MeshName) -> list[NodeId]:
        """Nodes of ``mesh`` that run on this machine now, by slot.

        Their process ids are looked at, not their locks: to try a lock, even for an instant, could make a
        node that starts at that instant take another slot.
        """
        found = []
        for path in sorted((self._mesh(mesh) / "nodes").glob("*/lock"), key=lambda path: path.parent.name):
            try:
                os.kill(int(path.read_text()), 0)
                record = _read(path.with_name("node.json"))
                node = NodeId(record["id"]) if record else None
            except PermissionError:  # it runs, as another user
                continue
            except (OSError, ValueError, KeyError, TypeError, ConfigError):
                continue  # it ended, or is just starting
            if node is not None:
                found.append(node)
        return found

    @staticmethod
    def _next_life(path: Path, hostname: str, rng: Random) -> tuple[NodeId, int]:
        record = _read(path)
        if record is None:
            node, incarnation = new_node_id(hostname, rng), 1
        else:
            try:
                node, incarnation = NodeId(record["id"]), int(record["incarnation"]) + 1
                if not is_id(node):
                    raise ValueError(f"impossible node id {node!r}")
            except (KeyError, TypeError, ValueError) as error:
                raise _damaged(path, error) from error
        _write(path, {"id": node, "incarnation": incarnation})
        return node, incarnation

    # ── brokers ─────────────────────────────────────────────────────────────────────────────────────

    def write_broker(self, mesh: MeshName, broker: KnownBroker) -> None:
        """Tell the other processes of this machine which broker serves ``mesh``."""
        ref, plain_port = broker.ref, broker.plain_port
        known = self.read_broker(mesh)
        if (
            plain_port is None
            and known is not None
            and (known.ref.epoch, known.ref.host) == (ref.epoch, ref.host)
        ):
            plain_port = known.plain_port  # only the node that hosts it knows its loopback port
        record = {
            "epoch": ref.epoch,
            "host": ref.host,
            "addresses": list(ref.addresses),
            "port": ref.port,
            "tls": ref.tls,
            "username": ref.username,
            "password": ref.password,
            "plain_port": plain_port,
        }
        path = self._mesh(mesh) / "broker.json"
        with _readable_errors(path):
            _make_dir(path.parent)
            _write(path, record)

    def read_broker(self, mesh: MeshName) -> KnownBroker | None:
        """The broker last written; ``None`` if there is none or the file is damaged (it is only a hint)."""
        path = self._mesh(mesh) / "broker.json"
        try:
            record = _read(path)
            if record is None:
                return None
            ref = BrokerRef(
                epoch=int(record["epoch"]),
                host=NodeId(record["host"]) if record["host"] is not None else None,
                addresses=tuple(str(address) for address in record["addresses"]),
                port=int(record["port"]),
                tls=bool(record["tls"]),
                username=record.get("username"),
                password=record.get("password"),
            )
            plain_port = record.get("plain_port")
            return KnownBroker(ref, int(plain_port) if plain_port is not None else None)
        except (ConfigError, OSError, KeyError, TypeError, ValueError):
            return None

    def forget_broker(self, mesh: MeshName, ref: BrokerRef) -> None:
        """Remove the hint if it still names ``ref``; another process may have written a newer one."""
        known = self.read_broker(mesh)
        if known is not None and known.names(ref):
            with suppress(OSError):  # a hint that cannot be removed is probed before use anyway
                (self._mesh(mesh) / "broker.json").unlink(missing_ok=True)

    # ── clients, models and data ────────────────────────────────────────────────────────────────────

    def client_identity(self, key: MeshKey, name: str, *, is_member: bool = True) -> Identity:
        """The certificate of a client called ``name``, issued if it is not there yet.

        Our own commands are members: who runs them can read the key. Whoever is given nothing but a
        certificate is not (``mesh.transport.identity.issue_client``).

        Raises:
            ConfigError: ``name`` cannot be a file name, or the directory cannot be written.
        """
        from mesh.transport.identity import issue, issue_client

        if not is_id(name):
            raise ConfigError(f"a client's name is 1 to 63 of a-z, 0-9 and '-', not at an end; got {name!r}")
        if is_member:
            return issue(key, name, self._mesh(key.name) / "clients" / name)
        return issue_client(key, name, self._mesh(key.name) / "shell" / name)

    @property
    def models_dir(self) -> Path:
        """Where weights live; not created here."""
        return self.path / "models"

    @property
    def adapters_dir(self) -> Path:
        return self.path / "adapters"

    @property
    def datasets_dir(self) -> Path:
        return self.path / "datasets"

    @property
    def features_dir(self) -> Path:
        return self.path / "features"

    def keep_dataset(self, content: bytes) -> str:
        """Tuning data for the nodes of this machine, durable on return; their SHA-256.

        The data longest unused make room; a task that waits for them would be refused, and say so.

        Raises:
            ConfigError: The directory cannot be written.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self.datasets_dir / f"{digest}.jsonl"
        with _readable_errors(path):
            _make_dir(path.parent)
            if path.exists():  # it is durable and whole, or it would not have its name
                os.utime(path)
            else:
                write_durably(path, content)
            newest_first = sorted(
                ((one, one.stat()) for one in path.parent.glob("*.jsonl")),
                key=lambda found: (found[0] != path, -found[1].st_mtime_ns),
            )
            n_bytes = 0
            for one, status in newest_first:
                n_bytes += status.st_size
                if n_bytes > DATASETS_BYTES_MAX and one != path:
                    one.unlink(missing_ok=True)
        return digest

    def _mesh(self, mesh: MeshName) -> Path:
        assert is_id(mesh), f"a mesh name that cannot be a file name: {mesh!r}"
        return self.path / "meshes" / mesh


# ── files ───────────────────────────────────────────────────────────────────────────────────────────

_NEXT_STEP = {
    errno.EACCES: "you may not write there; choose another place with --state-dir",
    errno.EPERM: "you may not write there; choose another place with --state-dir",
    errno.EROFS: "the file system is read-only; choose another place with --state-dir",
    errno.ENOSPC: "the disk is full; free some space or choose another place with --state-dir",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another place with --state-dir",
    errno.ENOTDIR: "a file is in the way; choose another place with --state-dir",
    errno.EEXIST: "a file is in the way; choose another place with --state-dir",
}


@contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        step = _NEXT_STEP.get(error.errno or 0, "choose another place with --state-dir")
        raise ConfigError(f"cannot use {path} ({error.strerror}): {step}") from error


def _make_dir(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def _try_lock(path: Path) -> int | None:
    """An open file that holds the lock, ``None`` if another process does."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)  # for ``nodes_here``
    return lock


def _read(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            record = json.loads(file.read(RECORD_BYTES_MAX))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(record, dict):
        raise _damaged(path, TypeError("not a JSON object"))
    return record


def _damaged(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} is damaged ({error}): remove {path.parent} and this node starts as a new one")


def _write(path: Path, record: dict[str, Any]) -> None:
    write_durably(path, json.dumps(record, indent=1).encode() + b"\n")
