"""Which of a host's addresses accepts TCP connections: all are asked at once, and no thread waits.

A library that connects in a worker thread is then sent only where somebody listens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["KNOCK_S", "Knocked", "knock"]

KNOCK_S = 1.0  # a TCP connection on a LAN takes milliseconds; a black hole takes all of this


@dataclass(frozen=True, slots=True)
class Knocked:
    """What came of it."""

    address: str | None
    """The first that accepted a connection."""
    faults: dict[str, OSError | TimeoutError]
    """Why the others, asked before that one answered, did not."""

    def refused(self, address: str) -> bool:
        """The host is there and said that nobody listens (it is not merely silent or out of reach)."""
        return isinstance(self.faults.get(address), ConnectionError)

    def __str__(self) -> str:
        return ", ".join(f"{address} {_text(fault)}" for address, fault in sorted(self.faults.items()))


async def knock(addresses: Sequence[str], port: int) -> Knocked:
    """Ask all ``addresses`` at once; the first to accept wins, the earlier one in a tie."""
    knocks = {asyncio.create_task(_knock(address, port), name="knock"): address for address in addresses}
    faults: dict[str, OSError | TimeoutError] = {}
    try:
        pending = set(knocks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when="FIRST_COMPLETED")
            for one in sorted(done, key=lambda one: addresses.index(knocks[one])):
                fault = one.result()
                if fault is None:
                    return Knocked(knocks[one], faults)
                faults[knocks[one]] = fault
        return Knocked(None, faults)
    finally:
        for one in knocks:
            one.cancel()
        await asyncio.gather(*knocks, return_exceptions=True)


async def _knock(address: str, port: int) -> OSError | TimeoutError | None:
    try:
        async with asyncio.timeout(KNOCK_S):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError) as error:
        return error
    writer.transport.abort()  # no TIME_WAIT on the other side, and nothing more to wait for
    return None


def _text(fault: OSError | TimeoutError) -> str:
    match fault:
        case ConnectionRefusedError():
            return "refuses connections"
        case TimeoutError():
            return f"is silent ({KNOCK_S:.0f} s)"
        case OSError():
            return fault.strerror or str(fault)
