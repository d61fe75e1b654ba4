"""Log lines: an event name and key-values, as text for people or JSON for machines, on stderr.

Every line of edgemesh's own carries an ``event``; libraries' lines appear from WARNING up.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

__all__ = ["say", "set_up"]

OURS = ("mesh", "coordinator", "node")


def say(log: logging.Logger, event: str, text: str, level: int = logging.INFO, **fields: Any) -> None:
    """One event: ``say(log, "elected", "this node coordinates now", epoch=str(epoch))``."""
    log.log(level, text, extra={"event": event, "fields": fields})


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{time.strftime('%FT%T', time.localtime(record.created))}.{record.msecs:03.0f}",
            "monotonic_s": round(time.monotonic(), 4),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", record.name),
            "text": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _TextLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        # What others chose (a client's id, a host's name) must neither steer a terminal nor look like a line.
        text = "".join(
            letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in record.getMessage()
        )
        line = f"{stamp}  {mark}{text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Sink(logging.Handler):
    def __init__(self, sink: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        self._sink(record.getMessage())


def set_up(
    style: Literal["text", "json"], level: str = "info", *, sink: Callable[[str], None] | None = None
) -> None:
    """Send this process's log to stderr in the chosen form, or to ``sink`` where a screen is in the way.

    A screen shows by itself who is there and who coordinates, so only warnings go to ``sink``.
    """
    handler = logging.StreamHandler(sys.stderr) if sink is None else _Sink(sink)
    handler.setFormatter(_JsonLines() if style == "json" else _TextLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in OURS:
        logging.getLogger(name).setLevel(level.upper())
