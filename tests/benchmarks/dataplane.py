"""What the data plane carries: blocks in batches of 1 MiB between two processes, each digest checked.

``goodput_ratio`` divides by a raw copy in the same run: two processes, one blocking TLS socket (same
certificates, same cipher), no digest. Both serve from memory; from files is in the detail.
``link_goodput_percent`` is the same read between two network namespaces through ``tc tbf`` at 200 Mbit/s,
against the link's rate; the raw copy through it is in the detail. Without namespaces or tc the metric is left
out, with the reason.

A busy machine divides its processors by processes, and we have more of them at work: ``cpu`` in the detail is
processor seconds per GB, reader and server, for both.

    python -m tests.benchmarks.dataplane [--quick] [--json]
"""

from __future__ import annotations

import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.report import Metric, Options, main, spread
from tests.integration.namespaces import Host, Lan, why_not

LINK_BYTES_PER_S = 200e6 / 8
TBF = "rate 200mbit burst 128kb latency 50ms"  # 5 ms of the link: a timer tick of 4 ms must not limit it
REPLY_TIMEOUT_S = 300

Start = Callable[[list[str]], "subprocess.Popen[str]"]


@dataclass(frozen=True, slots=True)
class _Ends:
    """How to start a process at each end, and where the server is reached."""

    serving: Start
    reading: Start
    address: str


def measure(options: Options) -> Iterator[Metric]:
    n_rounds, n_batches = (2, 64) if options.quick else (7, 512)
    with tempfile.TemporaryDirectory() as directory:
        yield _goodput(_Ends(_here, _here, "127.0.0.1"), directory, n_rounds, n_batches)
    reason = why_not() or (None if shutil.which("tc") else "tc is not installed")
    if reason is not None:
        print(f"link_goodput_percent is left out: {reason}", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as directory, Lan() as lan:
        pi, asker = lan.host("pi", "10.77.0.1/24"), lan.host("asker", "10.77.0.2/24")
        try:
            for host in (pi, asker):
                _shape(host)
        except subprocess.CalledProcessError as error:
            print(f"link_goodput_percent is left out: no tc tbf here: {error.stderr}", file=sys.stderr)
            return
        ends = _Ends(pi.start, asker.start, "10.77.0.1")
        yield _link(ends, directory, *((1, 48) if options.quick else (3, 192)))


def _goodput(ends: _Ends, directory: str, n_rounds: int, n_batches: int) -> Metric:
    ours, raw, small_ms = _rounds(ends, directory, n_rounds, n_batches)
    ratios = [_rate(a) / _rate(b) for a, b in zip(ours, raw, strict=True)]
    files, raw_beside, _ = _rounds(ends, directory, max(1, n_rounds // 2), n_batches, "serve-files")
    from_files = statistics.median(_rate(a) / _rate(b) for a, b in zip(files, raw_beside, strict=True))
    detail = {
        **spread(ratios),
        "MB/s": round(statistics.median(map(_rate, ours)) / 1e6),
        "raw MB/s": round(statistics.median(map(_rate, raw)) / 1e6),
        **_cpu(ours, raw),
        "from files": round(from_files, 3),
        "get of 1 KiB ms": round(small_ms, 2),
        "missed": sum(reply["n_missed"] for reply in ours + files),
    }
    return Metric("goodput_ratio", statistics.median(ratios), "of a raw TLS copy", ">= 0.6", n_rounds, detail)


def _link(ends: _Ends, directory: str, n_rounds: int, n_batches: int) -> Metric:
    ours, raw, small_ms = _rounds(ends, directory, n_rounds, n_batches)
    percents = [100 * _rate(reply) / LINK_BYTES_PER_S for reply in ours]
    detail = {
        **spread(percents),
        "raw TLS": round(statistics.median(100 * _rate(reply) / LINK_BYTES_PER_S for reply in raw), 2),
        "link": f"tbf {TBF}, no added delay",
        "get of 1 KiB ms": round(small_ms, 2),
        "missed": sum(reply["n_missed"] for reply in ours),
    }
    return Metric(
        "link_goodput_percent", statistics.median(percents), "% of 200 Mbit/s", ">= 90", n_rounds, detail
    )


def _rounds(
    ends: _Ends, directory: str, n_rounds: int, n_batches: int, role: str = "serve"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], float]:
    """Ours and raw in turn, so that both see the same machine; and the time of a small read in ms."""
    replies: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    with _server(ends, role, directory) as bulk, _server(ends, "serve-raw", directory) as raw:
        ports = [_reply(server)["port"] for server in (bulk, raw)]
        for _ in range(n_rounds):
            for place, (role, server) in enumerate((("read", bulk), ("read-raw", raw))):
                before = _ask(server) if role == "read" else {"cpu_s": 0.0}
                reader = ends.reading(
                    _command(role, directory, ends.address, str(ports[place]), str(n_batches))
                )
                reply = _reply(reader)
                reader.wait(REPLY_TIMEOUT_S)
                after = _ask(server) if role == "read" else _reply(server)
                reply["server_cpu_s"] = after["cpu_s"] - before["cpu_s"]
                replies[place].append(reply)
        small = _reply(ends.reading(_command("read-small", directory, ends.address, str(ports[0]))))
        assert not small["n_missed"], "a block that is there is not missed"
    return *replies, float(small["p50_ms"])


@contextlib.contextmanager
def _server(ends: _Ends, role: str, directory: str) -> Iterator[subprocess.Popen[str]]:
    process = ends.serving(_command(role, directory, ends.address))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.bulk_peer", *words]


def _here(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(server: subprocess.Popen[str]) -> dict[str, Any]:
    if server.stdin is None:  # in a namespace nobody asks for processor time
        return {"cpu_s": 0.0}
    server.stdin.write("\n")
    server.stdin.flush()
    return _reply(server)


def _reply(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"{process.args!r} ended without a word"
    reply: dict[str, Any] = json.loads(line)
    return reply


def _rate(reply: dict[str, Any]) -> float:
    return float(reply["n_bytes"] / reply["wall_s"])


def _cpu(ours: list[dict[str, Any]], raw: list[dict[str, Any]]) -> dict[str, str]:
    def per_gb(replies: list[dict[str, Any]], which: str) -> float:
        return statistics.median(reply[which] / reply["n_bytes"] * 1e9 for reply in replies)

    both = {"cpu": ours, "raw cpu": raw}
    return {
        name: f"{per_gb(replies, 'cpu_s'):.2f} + {per_gb(replies, 'server_cpu_s'):.2f} s/GB"
        for name, replies in both.items()
    }


def _shape(host: Host) -> None:
    command = f"tc -n {host.namespace} qdisc add dev eth0 root tbf {TBF}"
    subprocess.run(command.split(), check=True, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main("what the data plane carries", measure))
