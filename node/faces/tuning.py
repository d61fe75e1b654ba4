"""How a tuning task is getting on, in words: the same on the terminal view, in the demo and in a log."""

from __future__ import annotations

from mesh.messages import AdapterCard, TaskProgress
from mesh.units import bytes_text, seconds_text

__all__ = ["bar", "card_words", "is_passing", "progress_words", "short_words", "use_words"]

_FULL, _EMPTY = "█", "░"

_PHASES = {
    "reading": "reading the data",
    "features": "computing features",
    "choosing": "choosing layers",
    "training": "training",
    "saving": "saving",
}


def bar(fraction: float, width: int) -> str:
    """A bar of ``width`` letters that is full at 1 and only then."""
    n_full = min(int(fraction * width), width - 1) if fraction < 1 else width
    return _FULL * n_full + _EMPTY * (width - n_full)


def progress_words(progress: TaskProgress) -> str:
    """Such as ``training · epoch 3 of 5 · loss 0.412 · 12.0 s left · 96 % cached``."""
    words = [progress.text if is_passing(progress) else _PHASES[progress.phase]]
    if progress.epochs and progress.phase == "training":
        words.append(f"epoch {min(progress.epoch + 1, progress.epochs)} of {progress.epochs}")
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.3g}")
    if progress.metric is not None:
        words.append(f"evaluation {progress.metric:.3g}")
    if progress.eta_s:
        words.append(f"{seconds_text(progress.eta_s)} left")
    blocks = progress.cache_hits + progress.cache_misses
    if blocks:
        words.append(f"{progress.cache_hits / blocks:.0%} cached")
    return " · ".join(words)


def is_passing(progress: TaskProgress) -> bool:
    """Whether its text is about this moment, such as a count, and not something to remember."""
    return bool(progress.text) and progress.phase in ("reading", "choosing")


def short_words(progress: TaskProgress) -> str:
    """For a table's cell, such as ``epoch 3/5 · loss 0.412 · 12.0 s left``; the end may be cut."""
    is_training = progress.phase == "training" and progress.epochs > 0
    epoch = f"epoch {min(progress.epoch + 1, progress.epochs)}/{progress.epochs}"
    words = [epoch if is_training else progress.text if is_passing(progress) else _PHASES[progress.phase]]
    if progress.loss is not None:
        words.append(f"loss {progress.loss:.3g}")
    if progress.eta_s:
        words.append(f"{seconds_text(progress.eta_s)} left")
    return " · ".join(words)


def card_words(card: AdapterCard) -> str:
    """Such as ``adapter 'spam' (lora on the top 4 layers, 310 KiB, 0.93 on the evaluation data)``."""
    layers = "layer" if card.top_layers == 1 else f"{card.top_layers} layers"
    facts = [f"{card.method} on the top {layers}", bytes_text(card.bytes)]
    if card.metric is not None:
        name = "accuracy" if card.task == "classify" else "loss"
        facts.append(f"{name} {card.metric:.3g} on the evaluation data")
    if card.made:
        facts.append(card.made)
    return f"adapter '{card.name}' ({', '.join(facts)})"


def use_words(card: AdapterCard) -> str:
    """The command that uses it."""
    if card.task == "classify":
        return f'edgemesh classify --adapter {card.name} "TEXT"'
    return f'edgemesh run --adapter {card.name} "PROMPT"'
