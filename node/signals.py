"""Which signals end a node, and what they do to one that is still starting."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["end_at_once", "ending_signals"]


def ending_signals() -> list[signal.Signals]:
    """Ctrl-C, a polite kill, and the terminal going away; the last not under ``nohup``."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


def end_at_once() -> None:
    """Until a node is up there is nobody to say goodbye to: any of these signals ends it with code 0."""
    for number in ending_signals():
        signal.signal(number, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(0)
