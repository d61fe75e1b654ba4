"""Several real node processes on this machine, watched through their event lines.

The demo, the integration tests and the benchmarks run the mesh this way: nothing is simulated, every
node is an ``edgemesh join`` of its own with its own identity, ports and disk. All traffic stays on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mesh.errors import UnreachableError
from mesh.facts import BrokerRef
from mesh.ids import MeshName, NodeId
from node.settings import broker_text

__all__ = ["Event", "LocalMesh", "NodeProcess"]

Event = dict[str, Any]

EVENTS_KEPT = 10_000  # about 2 MB; a node says a few lines a minute
STOP_TIMEOUT_S = 10.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
    """In the new process: whoever started this mesh may be killed, and nobody else would end its nodes."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class NodeProcess:
    """One ``edgemesh join --headless --log-format json`` and what it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process, started_at: float) -> None:
        self._process = process
        self._news = asyncio.Condition()
        self._raw: deque[str] = deque(maxlen=200)
        self.started_at = started_at
        self.events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._reader = asyncio.create_task(self._read(), name=f"node-{process.pid}.read")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def id(self) -> NodeId:
        """Known from its first event on."""
        for event in self.events:
            if "node" in event and event["event"] == "starting":
                return NodeId(event["node"])
        raise LookupError("this node has not said its id yet")

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    @property
    def tail(self) -> str:
        """The last lines it said, for error messages."""
        return "\n".join(self._raw)

    async def wait_for(
        self,
        name: str,
        timeout_s: float = 30.0,
        *,
        after: int = 0,
        where: Callable[[Event], bool] = lambda event: True,
    ) -> Event:
        """The first event of this name (after the first ``after`` events) for which ``where`` holds.

        Raises:
            UnreachableError: It did not come in time, or the process ended first.
        """

        def found() -> Event | None:
            for index, event in enumerate(self.events):
                if index >= after and event["event"] == name and where(event):
                    return event
            return None

        try:
            async with asyncio.timeout(timeout_s), self._news:
                while (event := found()) is None:
                    if self._reader.done():
                        code = await self._process.wait()
                        raise UnreachableError(f"the node ended (code {code}) before {name!r}:\n{self.tail}")
                    await self._news.wait()
                return event
        except TimeoutError:
            text = f"no {name!r} from the node in {timeout_s:g} s; it said:\n{self.tail}"
            raise UnreachableError(text) from None

    def signal(self, number: signal.Signals) -> None:
        """To the node and nothing else: its compute process must notice by itself."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def kill(self) -> None:
        """As if the plug were pulled."""
        self.signal(signal.SIGKILL)
        await self._process.wait()
        await self._reader

    async def stop(self) -> int:
        """Ask it to leave; insist after ten seconds. Returns the exit code."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                code = await self._process.wait()
        except TimeoutError:
            self.signal(signal.SIGKILL)
            code = await self._process.wait()
        await self._reader
        return code

    async def _read(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            self._raw.append(text)
            try:
                event = json.loads(text)
            except ValueError:
                continue  # a warning of the interpreter or of a library, kept in the tail
            if isinstance(event, dict) and "event" in event:
                self.events.append(event)
                async with self._news:
                    self._news.notify_all()
        async with self._news:
            self._news.notify_all()


class LocalMesh:
    """Starts nodes that share one state directory and one mesh, and stops whatever still runs at the end."""

    def __init__(
        self,
        state_dir: Path,
        mesh: MeshName,
        *,
        flags: tuple[str, ...] = (),
        broker: BrokerRef | None = None,
        interfaces: str | None = "lo",
        prefix: tuple[str, ...] = (),
    ) -> None:
        """One machine's share of a mesh.

        Args:
            state_dir: Of this machine.
            flags: Of every node.
            broker: The site's own, which nodes and commands then use.
            interfaces: Where to speak; ``None``: on every real one.
            prefix: Runs a command elsewhere (``ip netns exec NAME``): another machine for a test.
        """
        self.state_dir = state_dir
        self.mesh = mesh
        self.broker = broker
        self._flags = flags
        self._interfaces = interfaces
        self._prefix = prefix
        self.nodes: list[NodeProcess] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(node.stop() for node in self.nodes if node.is_running))

    @property
    def running(self) -> list[NodeProcess]:
        return [node for node in self.nodes if node.is_running]

    def command(self, *arguments: str) -> list[str]:
        """An ``edgemesh`` command line for this mesh, to run beside the nodes."""
        return [*self._prefix, sys.executable, "-m", "node", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("EDGEMESH_")},
            "EDGEMESH_STATE_DIR": str(self.state_dir),
            "EDGEMESH_MESH": self.mesh,
            **({"EDGEMESH_INTERFACES": self._interfaces} if self._interfaces is not None else {}),
            **({"EDGEMESH_BROKER": broker_text(self.broker)} if self.broker is not None else {}),
        }

    async def start(self, *flags: str) -> NodeProcess:
        """One more node. Returns at once; wait for its events."""
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        process = await asyncio.create_subprocess_exec(
            *self.command("join", "--headless", "--log-format", "json", *self._flags, *flags),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
            limit=1024 * 1024,
            start_new_session=True,  # Ctrl-C at the demo is ours to pass on
            preexec_fn=_end_with_parent,
        )
        node = NodeProcess(process, started_at)
        self.nodes.append(node)
        return node

    async def start_many(self, n_nodes: int, *flags: str, timeout_s: float = 30.0) -> list[NodeProcess]:
        """``n_nodes`` more, all joined when this returns."""
        first = [] if self.nodes else [await self.start("--new", *flags)]
        if first:
            await first[0].wait_for("starting", timeout_s)  # the mesh key exists from here on
        nodes = first + [await self.start(*flags) for _ in range(n_nodes - len(first))]
        await asyncio.gather(*(node.wait_for("joined", timeout_s) for node in nodes))
        return nodes

    async def run(self, *arguments: str, timeout_s: float = 60.0) -> tuple[int, str, str]:
        """One command beside the nodes: exit code, stdout, stderr."""
        process = await asyncio.create_subprocess_exec(
            *self.command(*arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self.environment,
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate()
        except TimeoutError:
            process.kill()
            await process.wait()
            text = f"edgemesh {' '.join(arguments)} took longer than {timeout_s:g} s"
            raise UnreachableError(text) from None
        assert process.returncode is not None
        return process.returncode, out.decode(), err.decode()
