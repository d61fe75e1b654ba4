"""Asks a port whether *our* broker answers there: TLS with the mesh's certificate, CONNECT, CONNACK.

A listening port proves little: another process may have taken it. Twenty bytes of MQTT prove all of it.
"""

from __future__ import annotations

import asyncio
import ssl

__all__ = ["accepts_clients"]

# CONNECT: protocol "MQTT" level 4 (3.1.1), clean session, keepalive 10 s, empty client id.
_CONNECT = b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x0a\x00\x00"
_CONNACK = b"\x20\x02\x00\x00"
_DISCONNECT = b"\xe0\x00"


async def accepts_clients(host: str, port: int, context: ssl.SSLContext | None, timeout_s: float) -> bool:
    """Whether a broker at ``host:port`` accepts a client of this mesh within ``timeout_s``.

    ``context=None`` asks a plain listener. An answer of any other kind is ``False``, never an exception.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
            try:
                writer.write(_CONNECT)
                if await reader.readexactly(len(_CONNACK)) != _CONNACK:
                    return False
                writer.write(_DISCONNECT)
                await writer.drain()
                return True
            finally:
                writer.transport.abort()
    except (OSError, EOFError, TimeoutError):
        return False
