"""llama.cpp in a process of its own, asked by lines: ``python -m tests.benchmarks.llamacpp GGUF THREADS``.

Not inside ours: its threads count as OpenMP's, which then lets ours sleep at every barrier instead of waiting
awake, and halves their speed (measured: 38 tokens/s alone, 21 beside an idle server in one process).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.places import ROOT

__all__ = ["LlamaCpp"]

_SEQUENCES_MAX = 16
_PROMPT = "Once upon a time"


class LlamaCpp:
    """A running llama.cpp; every answer is in tokens/s.

    Raises:
        SystemExit: The wheel is not installed.
    """

    def __init__(self, gguf: Path, threads: int) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise SystemExit(
                "this benchmark runs llama.cpp beside us: `pip install xllamacpp` (or `pip install .[dev]`)"
            )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.llamacpp", str(gguf), str(threads)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def decode(self, n_tokens: int) -> float:
        """One sequence, by its own clock."""
        return self._ask("decode", n_tokens)

    def decode_many(self, n_tokens: int) -> float:
        """Sixteen at once, by the wall from the first request: prompts of one token, so that reading them is
        next to nothing."""
        return self._ask("many", n_tokens)

    def prefill(self, n_tokens: int) -> float:
        """A prompt of so many tokens, by its own clock."""
        return self._ask("prefill", n_tokens)

    def _ask(self, what: str, n_tokens: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what} {n_tokens}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp ended with exit code {self._process.wait()}")
        return float(line)


def _serve(gguf: str, threads: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_parallel = _SEQUENCES_MAX
    params.n_ctx = _SEQUENCES_MAX * 1024
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_prompt = False
    params.verbosity = -1
    with contextlib.redirect_stdout(sys.stderr):
        server = xllamacpp.Server(params)
    for line in sys.stdin:
        what, n_tokens = line.split()
        print(_answer(server, what, int(n_tokens)), flush=True)


def _answer(server: Any, what: str, n_tokens: int) -> float:
    match what:
        case "decode":
            return _timings(server, _PROMPT, n_tokens)["predicted_per_second"]
        case "prefill":
            timings = _timings(server, list(range(1000, 1000 + n_tokens)), 1)
            assert timings["prompt_n"] >= n_tokens
            return timings["prompt_per_second"]
        case _:
            askers = [
                threading.Thread(target=_timings, args=(server, [20 + 7 * at], n_tokens))
                for at in range(_SEQUENCES_MAX)
            ]
            start_s = time.perf_counter()
            for asker in askers:
                asker.start()
            for asker in askers:
                asker.join()
            return _SEQUENCES_MAX * n_tokens / (time.perf_counter() - start_s)


def _timings(server: Any, prompt: str | list[int], n_tokens: int) -> dict[str, float]:
    request = {
        "prompt": prompt, "n_predict": n_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False
    }  # fmt: skip
    answer = server.handle_completions(request)
    timings: dict[str, float] = (json.loads(answer) if isinstance(answer, str) else answer)["timings"]
    return timings


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
