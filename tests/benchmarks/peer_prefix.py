"""Time to the first token after a prefix of 1,000 tokens that a peer has read, against reading it here.

Two real nodes on loopback with SmolLM2, one thread each, over the whole way: the first reads, publishes and
serves, the second hears of it, asks its node, fetches over TLS and begins with the first layers. Prefixes are
new in each repetition. The second node holds no share of the cache (``--feature-disk 0``), or the mesh would
bring it the states before anybody asks for them.

cold     nobody has read the prefix: the second node reads it
fetched  the first node has read it and has published it
own      the second node has read it itself: what remains when fetching costs nothing

``limit`` is the cold time divided by what cannot be saved: the states' bytes at the rate of a raw TLS copy
between two processes in the same run, and the time of ``own``. ``at 1 Gbit/s`` and ``at 200 Mbit/s`` are
arithmetic: bytes over the link's rate instead, wherever that is longer than what was measured.

    python -m tests.benchmarks.peer_prefix [--quick] [--json]
"""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from random import Random

from mesh.ids import MeshName, TaskId
from mesh.messages import Submit, TaskResult
from node.cache.assembly import REPORT_EVERY_S
from node.compute.convert import convert
from node.compute.models import DEFAULT_MODEL, prepare, resolve
from node.local_mesh import LocalMesh, NodeProcess
from tests.benchmarks.report import Metric, Options, main, spread
from tests.benchmarks.vdf_real import WORDS
from tests.places import models_dir
from tests.traffic import Traffic, traffic

PREFIX_TOKENS = 1000
PRECISION = "int8"  # it reads fastest here, so its cold time is the hardest to beat
START_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 120.0
PUBLISHED_TIMEOUT_S = 60.0
# Of the demo model: keys and values of 30 layers, 3 heads of 64 numbers each, in float32.
BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 4
BLOCK_TOKENS = 64
LINKS_BYTES_PER_S = {"at 1 Gbit/s": 1e9 / 8, "at 200 Mbit/s": 200e6 / 8}


def measure(options: Options) -> Iterator[Metric]:
    prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    repeats = 2 if options.quick else 7
    times, n_tokens = asyncio.run(_measured(repeats, Random(secrets.token_hex(8))))
    raw_bytes_per_s = _raw_tls_bytes_per_s(64 if options.quick else 256)
    ratios = [cold / fetched for cold, fetched in zip(times["cold"], times["fetched"], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    n_bytes = n_tokens // BLOCK_TOKENS * BLOCK_TOKENS * BYTES_PER_TOKEN
    limit = medians["cold"] / (n_bytes / raw_bytes_per_s + medians["own"])
    detail = {
        **spread(ratios),
        "limit": round(limit, 1),
        "prefix_tokens": n_tokens,
        "MB": round(n_bytes / 1e6, 1),
        "raw TLS MB/s": round(raw_bytes_per_s / 1e6),
        "precision": PRECISION,
        "threads": 1,
    }
    for name, link_bytes_per_s in LINKS_BYTES_PER_S.items():
        slower_s = max(medians["fetched"], n_bytes / link_bytes_per_s + medians["own"])
        detail[name] = round(medians["cold"] / slower_s, 1)
    yield Metric("peer_prefix_speedup", statistics.median(ratios), "x", ">= 5", repeats, detail)
    for name, values in times.items():
        values_ms = [1e3 * value for value in values]
        yield Metric(
            f"ttft_{name}_ms", statistics.median(values_ms), "ms", seeds=repeats, detail=spread(values_ms)
        )


async def _measured(repeats: int, rng: Random) -> tuple[dict[str, list[float]], int]:
    """Seconds by kind, and tokens of a prompt."""
    times: dict[str, list[float]] = {"cold": [], "fetched": [], "own": []}
    n_tokens = n_held = 0
    async with _mesh() as (mesh, reader, asker), traffic(mesh) as client:
        for repeat in range(repeats + 1):
            theirs, ours = _text(rng, PREFIX_TOKENS), _text(rng, PREFIX_TOKENS)
            await _only(mesh, reader, asker)
            await _ask(client, theirs + " What is it?", reader)
            n_held = await _published(mesh, reader, n_held)
            await _only(mesh, asker, reader)
            cold = await _ask(client, ours + " Who was there?", asker)
            fetched = await _ask(client, theirs + " Who was there?", asker)
            own = await _ask(client, ours + " Why so many?", asker)
            n_tokens = cold.n_prompt_tokens
            _say(f"{repeat}: " + ", ".join(f"{r.ttft_s:.3f} s" for r in (cold, fetched, own) if r.ttft_s))
            if repeat:  # the first teaches how fast the link is
                for name, result in (("cold", cold), ("fetched", fetched), ("own", own)):
                    assert result.ttft_s is not None
                    times[name].append(result.ttft_s)
    return times, n_tokens


@asynccontextmanager
async def _mesh() -> AsyncIterator[tuple[LocalMesh, NodeProcess, NodeProcess]]:
    """The mesh, the node that reads first, and the one that asks."""
    name, directory = MeshName(f"bench-{secrets.token_hex(3)}"), models_dir().parent
    flags = ("--model", DEFAULT_MODEL, "--threads", "1", "--precision", PRECISION)
    async with LocalMesh(directory, name, flags=flags) as mesh:
        reader = await mesh.start("--new")
        await reader.wait_for("joined", START_TIMEOUT_S)
        asker = await mesh.start("--feature-disk", "0")
        await asyncio.gather(*(node.wait_for("engine_ready", START_TIMEOUT_S) for node in mesh.nodes))
        yield mesh, reader, asker
    shutil.rmtree(directory / "meshes" / name, ignore_errors=True)


async def _published(mesh: LocalMesh, reader: NodeProcess, before: int) -> int:
    """How many blocks the reader gives, once they are more than ``before`` and grow no more.

    It says so every two seconds, if anything has changed.
    """
    held = [before]
    async with asyncio.timeout(PUBLISHED_TIMEOUT_S):
        while len(held) < 2 or held[-1] != held[-2] or held[-1] <= before:
            await asyncio.sleep(REPORT_EVERY_S)
            code, out, said = await mesh.run("cache", "--json")
            assert not code, said
            rows = {row["node"]: row for row in json.loads(out)["nodes"]}
            held.append(rows[reader.id]["report"]["blocks"])
    return held[-1]


async def _only(mesh: LocalMesh, works: NodeProcess, rests: NodeProcess) -> None:
    for words in (("drain", rests.id), ("drain", "--resume", works.id)):
        code, _, said = await mesh.run(*words)
        assert not code, said


async def _ask(client: Traffic, prompt: str, node: NodeProcess) -> TaskResult:
    task = client.submit(Submit(prompt=prompt, max_tokens=1, id=TaskId(f"p-{secrets.token_hex(6)}")))
    await client.wait(lambda: bool(client.results[task]), ANSWER_TIMEOUT_S, "an answer")
    result = client.results[task][-1]
    assert result.state == "done" and result.node == node.id, (result.state, result.reason, result.node)
    return result


def _text(rng: Random, n_tokens: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(n_tokens))


def _raw_tls_bytes_per_s(n_batches: int) -> float:
    """Two processes and a blocking TLS socket, nothing else."""
    command = [sys.executable, "-m", "tests.benchmarks.bulk_peer"]
    with tempfile.TemporaryDirectory() as directory:
        server = subprocess.Popen(
            [*command, "serve-raw", directory, "127.0.0.1"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert server.stdout is not None
            port = json.loads(server.stdout.readline())["port"]
            words = [*command, "read-raw", directory, "127.0.0.1", str(port), str(n_batches)]
            reply = json.loads(subprocess.check_output(words, text=True, timeout=ANSWER_TIMEOUT_S))
        finally:
            server.kill()
            server.wait()
    return float(reply["n_bytes"] / reply["wall_s"])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main("what a prefix that a peer has read saves", measure))
