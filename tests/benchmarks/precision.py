"""What each weight format costs and saves: memory, perplexity and speed of the demo model.

Memory is what the weights take in the process, embedding and head included (the head's matrix is held
once, the embedding's rows are read from the file); what a child process grew by when it loaded the model
stands beside it. Perplexity is on held-out text of two kinds, the same tokens for every format: news
(Reuters R8) and newsgroups. The bundled model's weights were made from 4-bit ones (Q4_1, groups of 32),
which makes ``int4`` look as good as it does; ``int8`` owes nothing to that.

``OMP_NUM_THREADS`` sets the threads, as everywhere; on a machine that does other things, 1 is fastest.
"""

from __future__ import annotations

import gc
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from node.compute.backbone.contract import Backbone, Segment
from node.compute.backbone.load import load_backbone
from node.compute.convert import convert
from node.compute.models import DEFAULT_MODEL, prepare, resolve
from tests.benchmarks.datasets import load
from tests.benchmarks.report import Metric, Options, main, spread
from tests.places import models_dir

FORMATS = ("fp32", "bf16", "fp16", "int8", "int4")
QUICK_FORMATS = ("fp32", "int8", "int4")
HOPELESS = 4.0  # times slower at reading than another format: nobody uses it here, its perplexity is left out
BLOCK_TOKENS = 256  # context of every token whose likelihood counts: at most this
TARGETS = {
    "int8_memory_saving": ">= 60",
    "int8_perplexity_rise": "<= 1",
    "int4_memory_saving": ">= 80",
    "int4_perplexity_rise": "<= 2",
}

# Prints the anonymous memory of a process (bytes) that loaded the model: what cannot be given back.
_CHILD = """\
import sys
from pathlib import Path
from node.compute.backbone.load import load_backbone
def held():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
import gc
before = held()
backbone = load_backbone(Path(sys.argv[1]), "cpu", sys.argv[2])
gc.collect()
print(held() - before)
"""


def measure(options: Options) -> Iterator[Metric]:
    directory, _ = prepare(resolve(DEFAULT_MODEL), models_dir(), convert, lambda text, fraction: None)
    texts = _held_out(directory, BLOCK_TOKENS * (2 if options.quick else 24))
    held: dict[str, int] = {}
    perplexities: dict[str, dict[str, float]] = {}
    fastest = 0.0
    for precision in QUICK_FORMATS if options.quick else FORMATS:
        backbone = load_backbone(directory, "cpu", precision)
        held[precision] = backbone.held_bytes
        decode, prefill = _speed(backbone, repeats=2 if options.quick else 6)
        yield from (decode, prefill)
        fastest = max(fastest, prefill.value)
        if prefill.value * HOPELESS > fastest:
            perplexities[precision] = {name: _perplexity(backbone, ids) for name, ids in texts.items()}
        del backbone
        gc.collect()
    plain = perplexities["fp32"]
    rss = {p: _resident_mb(directory, p) for p in held} if sys.platform == "linux" else {}
    for precision, n_bytes in held.items():
        saving = 100 * (1 - n_bytes / held["fp32"])
        detail: dict[str, object] = {
            "held_mb": round(n_bytes / 1e6, 1),
            "process_grew_mb": rss.get(precision),
        }
        name = f"{precision}_memory_saving"
        yield Metric(name, saving, "%", TARGETS.get(name), detail=detail)
        found = perplexities.get(precision)
        if found is None:
            continue
        rises = {name: 100 * (found[name] / plain[name] - 1) for name in found}
        name = f"{precision}_perplexity_rise"
        detail = {
            **{f"{text}_rise": round(rise, 2) for text, rise in rises.items()},
            **{f"{text}_perplexity": round(value, 3) for text, value in found.items()},
            "tokens": sum(map(len, texts.values())),
        }
        yield Metric(name, max(rises.values()), "%", TARGETS.get(name), seeds=len(texts), detail=detail)


def _held_out(directory: Path, n_tokens: int) -> dict[str, list[int]]:
    """The first ``n_tokens`` of the test split of two sets; nothing here was ever used to choose anything."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    found = {}
    for name in ("r8", "newsgroups"):
        text = "\n\n".join(item.text for item in load(name).test)
        found[name] = tokenizer.encode(text[: 8 * n_tokens])[:n_tokens]
        assert len(found[name]) == n_tokens, f"{name} has too little text"
    return found


def _perplexity(backbone: Backbone, ids: list[int]) -> float:
    """Of every token but the first of each block of ``BLOCK_TOKENS``."""
    total, n = 0.0, 0
    for start in range(0, len(ids), BLOCK_TOKENS):
        block = ids[start : start + BLOCK_TOKENS]
        rows = backbone.forward([Segment(backbone.states(len(block)), block, n_wanted=len(block))]).rows
        logits = backbone.logits(rows[:-1])
        total += float(F.cross_entropy(logits, torch.tensor(block[1:]), reduction="sum"))
        n += len(block) - 1
    return math.exp(total / n)


def _speed(backbone: Backbone, repeats: int) -> tuple[Metric, Metric]:
    """Informative: decoding one sequence, and reading a prompt of 256."""
    decode, prefill = [], []
    ids = list(range(1000, 1256))
    for repeat in range(repeats + 1):
        states = backbone.states(300)
        start_s = time.perf_counter()
        backbone.logits(backbone.forward([Segment(states, ids)]).rows)
        read_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        for token in ids[:8]:
            backbone.logits(backbone.forward([Segment(states, [token])]).rows)
        if repeat:
            prefill.append(len(ids) / read_s)
            decode.append(8 / (time.perf_counter() - start_s))

    def metric(name: str, values: list[float]) -> Metric:
        full_name = f"{backbone.precision}_{name}_tok_s"
        return Metric(full_name, statistics.median(values), "tokens/s", seeds=repeats, detail=spread(values))

    return metric("decode", decode), metric("prefill", prefill)


def _resident_mb(directory: Path, precision: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(directory), precision],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    return round(int(done.stdout) / 1e6, 1)


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", measure))
