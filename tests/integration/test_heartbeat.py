"""A long answer of the real model must not make its node look dead."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from mesh.agreement.membership import MembershipConfig
from mesh.facts import LinkUp
from mesh.ids import NodeId, TaskId
from mesh.messages import NodeReport, Submit, TaskResult
from mesh.topics import METRICS, RESULT
from mesh.transport.bus import Heard
from node.client import connected
from node.state import StateDir
from tests.integration.meshes import local_mesh
from tests.traffic import settings_of

LENGTH_S = 30.0


@pytest.mark.model
async def test_a_thirty_second_generation_never_delays_a_heartbeat(
    tmp_path: Path, model_directory: Path
) -> None:
    """Both nodes compute all the time, on however few cores there are."""
    (tmp_path / "models").symlink_to(model_directory.parent)
    heard_at: dict[NodeId, list[float]] = defaultdict(list)
    async with local_mesh(tmp_path, 2, model="smollm2-135m") as mesh:
        settings = settings_of(mesh)
        async with connected(settings, StateDir(tmp_path), (METRICS, RESULT)) as client:
            async with asyncio.timeout(20):
                while not isinstance(await client.next(1.0), LinkUp):
                    pass
            tasks = {TaskId(f"t-{k}") for k in range(4)}
            started_at = time.monotonic()
            for task in sorted(tasks):
                prompt = "Tell me a very long story about the sea, with many chapters."
                client.publish(Submit(prompt=prompt, max_tokens=4000, deadline_s=LENGTH_S, id=task))
            ended: set[TaskId] = set()
            async with asyncio.timeout(LENGTH_S + 60):
                while ended < tasks:
                    match await client.next(1.0):
                        case Heard(message=NodeReport() as report):
                            heard_at[report.node].append(time.monotonic())
                        case Heard(message=TaskResult() as result):
                            ended.add(result.task)
                            assert result.state == "expired", result
            assert time.monotonic() - started_at >= LENGTH_S
    assert len(heard_at) == 2
    for node, times in heard_at.items():
        gap_s = max(later - earlier for earlier, later in pairwise(times))
        assert gap_s < MembershipConfig().silence_s, f"{node} was silent for {gap_s:.1f} s"
