"""A site's own Mosquitto, as an operator would run it: plain, anonymous, nothing persisted."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path

from mesh.broker import mosquitto_path
from mesh.facts import BrokerRef

__all__ = ["SiteBroker", "free_port"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class SiteBroker:
    """``async with SiteBroker(tmp_path) as broker``; may be killed and started again on its port."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self.port = free_port()

    @property
    def ref(self) -> BrokerRef:
        return BrokerRef(epoch=0, host=None, addresses=("127.0.0.1",), port=self.port, tls=False)

    async def __aenter__(self) -> SiteBroker:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Returns when it accepts connections; takes another port if this one was snatched meanwhile."""
        for _ in range(5):
            config = self._directory / "site.conf"
            config.write_text(
                f"listener {self.port} 127.0.0.1\nallow_anonymous true\n"
                "persistence false\nset_tcp_nodelay true\n"
            )
            executable = mosquitto_path()
            assert executable, "these tests need Debian's mosquitto package"
            self._process = await asyncio.create_subprocess_exec(
                executable, "-c", str(config), stderr=asyncio.subprocess.DEVNULL
            )
            while self._process.returncode is None:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.005)  # until it listens; it has no other way to say so
                    continue
                writer.close()
                return
            self.port = free_port()
        raise AssertionError("mosquitto did not start")

    async def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            await self._process.wait()

    def stop(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
