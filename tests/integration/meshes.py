"""Meshes of real node processes for tests: small, on loopback, each with a name of its own."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mesh.facts import BrokerRef
from mesh.ids import MeshName, NodeId, TaskId
from mesh.messages import Submit
from node.local_mesh import LocalMesh, NodeProcess

__all__ = ["by_id", "coordinator_of", "elected", "local_mesh", "words"]


@asynccontextmanager
async def local_mesh(
    directory: Path, n_nodes: int, *flags: str, model: str = "echo:30", broker: BrokerRef | None = None
) -> AsyncIterator[LocalMesh]:
    """``n_nodes`` joined nodes that can compute; stopped at the end."""
    name = MeshName(f"test-{secrets.token_hex(4)}")
    async with LocalMesh(directory, name, flags=("--model", model, *flags), broker=broker) as mesh:
        await mesh.start_many(n_nodes)
        await asyncio.gather(*(node.wait_for("engine_ready", 60) for node in mesh.nodes))
        yield mesh


def words(n_words: int, **options: Any) -> Submit:
    """A task that echoes ``n_words`` words, one a token."""
    task = TaskId(f"t-{secrets.token_hex(6)}")
    return Submit(prompt=" ".join(f"w{k}" for k in range(n_words)), id=task, max_tokens=n_words, **options)


def by_id(mesh: LocalMesh) -> dict[NodeId, NodeProcess]:
    return {node.id: node for node in mesh.running}


def coordinator_of(mesh: LocalMesh) -> NodeProcess:
    """The running node that was elected last."""
    last: tuple[float, NodeProcess] | None = None
    for node in mesh.running:
        for event in node.events:
            if event["event"] == "elected" and (last is None or event["monotonic_s"] > last[0]):
                last = (event["monotonic_s"], node)
    assert last is not None, "nobody was elected yet"
    return last[1]


async def elected(marks: dict[NodeProcess, int], timeout_s: float) -> tuple[NodeProcess, dict[str, Any]]:
    """The first of these nodes that is elected after its mark (a number of events), and that event."""
    waiting = {
        asyncio.create_task(node.wait_for("elected", timeout_s, after=mark)): node
        for node, mark in marks.items()
    }
    done, others = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    winner = done.pop()
    return waiting[winner], winner.result()
