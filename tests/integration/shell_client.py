"""What a person with ``mosquitto_pub`` and ``mosquitto_sub`` sees: real processes, the plain port."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

__all__ = ["Heard", "needs_mosquitto_clients", "publish", "subscribed"]

needs_mosquitto_clients = pytest.mark.skipif(
    shutil.which("mosquitto_pub") is None, reason="needs Debian's mosquitto-clients package"
)


async def publish(topic: str, payload: bytes, *connection: str) -> tuple[int, str]:
    """``mosquitto_pub`` with the payload on its standard input: exit code and what it complained about."""
    process = await asyncio.create_subprocess_exec(
        "mosquitto_pub", *connection, "-q", "1", "-t", topic, "-s" if payload else "-n",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(15):
        _, err = await process.communicate(payload)
    assert process.returncode is not None
    return process.returncode, err.decode()


class Heard:
    """Lines of one ``mosquitto_sub -v``, as (topic, decoded JSON or text)."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._news = asyncio.Condition()
        self.granted = asyncio.Event()
        self.lines: list[tuple[str, Any]] = []

    async def read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            topic, _, payload = line.decode().rstrip("\n").partition(" ")
            if "/" not in topic:  # what -d tells about packets; every topic of ours has levels
                if "SUBACK" in payload:
                    self.granted.set()
                continue
            try:
                self.lines.append((topic, json.loads(payload)))
            except ValueError:
                self.lines.append((topic, payload))
            async with self._news:
                self._news.notify_all()

    async def wait_for(self, wanted: Callable[[str, Any], bool], what: str, timeout_s: float = 15.0) -> Any:
        """The payload of the first line that is ``wanted``."""

        def found() -> list[Any]:
            return [payload for topic, payload in self.lines if wanted(topic, payload)]

        return (await self.wait_until(found, what, timeout_s))[0]

    async def wait_until(
        self, found: Callable[[], list[Any]], what: str, timeout_s: float = 15.0
    ) -> list[Any]:
        """What ``found`` gives as soon as that is not empty."""
        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(lambda: bool(found()))
        except TimeoutError:
            raise AssertionError(f"not heard in {timeout_s:g} s: {what}; heard {self.lines[-8:]}") from None
        return found()


@asynccontextmanager
async def subscribed(filters: list[str], *connection: str) -> AsyncIterator[Heard]:
    """A running ``mosquitto_sub`` that has its subscriptions."""
    topics = [part for one in filters for part in ("-t", one)]
    process = await asyncio.create_subprocess_exec(
        "stdbuf", "-oL", "mosquitto_sub", *connection, "-q", "1", "-v", "-d", *topics,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    heard = Heard(process)
    reading = asyncio.create_task(heard.read())
    try:
        async with asyncio.timeout(15):
            await heard.granted.wait()
        yield heard
    finally:
        process.kill()
        await process.wait()
        await reading
