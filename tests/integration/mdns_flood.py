"""One listener, one honest peer, and thousands of forged records; prints what it did to the listener.

Run in a network of its own, with loopback up: ``unshare -n``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import socket
from dataclasses import replace
from pathlib import Path

from zeroconf import DNSOutgoing, ServiceInfo

from mesh.ids import Boot, MeshName, NodeId
from mesh.transport.adverts import Advert, Gone, txt_of
from mesh.transport.discovery import SERVICE_TYPE, Discovery

N_FORGED = 3000  # services that read well
N_BROKEN = 3000  # services that do not
N_RANDOM = 2000  # packets of noise
_RESPONSE = 0x8400  # a response with authority, RFC 1035 4.1.1


def advert_of(name: str) -> Advert:
    return Advert(
        mesh=MeshName("home"), fingerprint="ab12", node=NodeId(name), boot=Boot("b"), incarnation=1, port=8470
    )


def announcement(name: str, txt: dict[str, str] | bytes, rng: random.Random) -> bytes:
    address = socket.inet_ntoa(rng.randbytes(4))
    info = ServiceInfo(
        SERVICE_TYPE, f"{name}.{SERVICE_TYPE}", port=rng.randrange(1, 65536), properties=txt,
        server=f"{name}.local.", parsed_addresses=[address],
    )  # fmt: skip
    out = DNSOutgoing(_RESPONSE)
    for record in (info.dns_pointer(), info.dns_service(), info.dns_text(), *info.dns_addresses()):
        out.add_answer_at_time(record, 0)
    return out.packets()[0]


def packets(rng: random.Random) -> list[bytes]:
    made = []
    for k in range(N_FORGED):
        made.append(announcement(f"forged-{k}", txt_of(advert_of("x")), rng))
    for k in range(N_BROKEN):
        txt: dict[str, str] | bytes = rng.randbytes(200) if k % 2 else {"v": "1", "mesh": "#" * (k % 200)}
        name = f"broken-{k}" if k % 3 else f"Broken {k} \u00fc"
        made.append(announcement(name, txt, rng))
    for k in range(N_RANDOM):
        noise = bytearray(made[k])
        for _ in range(8):
            noise[rng.randrange(len(noise))] = rng.randrange(256)
        made.append(bytes(noise) if k % 2 else rng.randbytes(rng.randrange(1, 1400)))
    rng.shuffle(made)
    return made


def rss_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


async def main() -> None:
    rng = random.Random(1)
    lines: list[str] = []
    counting = logging.Handler()
    counting.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.basicConfig(level=logging.INFO, handlers=[counting])
    forged = packets(rng)
    peer, lag_s_max = advert_of("peer"), 0.0
    async with Discovery(advert_of("listener"), ("lo",)) as listener, Discovery(peer, ("lo",)) as honest:
        async with asyncio.timeout(5):
            seen_before = await anext(listener.sightings())
        grown_mb = -rss_mb()

        async def feel_lag() -> None:
            nonlocal lag_s_max
            loop = asyncio.get_running_loop()
            while True:
                due_at = loop.time() + 0.01
                await asyncio.sleep(0.01)
                lag_s_max = max(lag_s_max, loop.time() - due_at)

        async def flood() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
                source.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
                source.bind(("127.0.0.1", 0))
                source.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                for k, packet in enumerate(forged):
                    source.sendto(packet, ("224.0.0.251", 5353))
                    if k % 20 == 0:
                        await asyncio.sleep(0.001)

        feeling = asyncio.create_task(feel_lag())
        await flood()
        grown_mb += rss_mb()
        n_arrived = len(listener._known)
        n_waiting = max(len(listener._pending), len(listener._ready))
        await honest.update(replace(peer, broker_epoch=9, broker_host=NodeId("pi"), broker_port=1))
        is_updated = False
        try:
            async with asyncio.timeout(10):
                async for news in listener.sightings():
                    if isinstance(news, Gone):
                        continue
                    if news.advert.node == "peer" and news.advert.broker_epoch == 9:
                        is_updated = True
                        break
        except TimeoutError:
            pass
        feeling.cancel()
    print(
        json.dumps(
            {
                "peer_seen_before": not isinstance(seen_before, Gone) and seen_before.advert.node == "peer",
                "peer_update_seen_after": is_updated,
                "forged_arrived": n_arrived,
                "forged_waiting": n_waiting,
                "grown_mb": round(grown_mb, 1),
                "lag_s_max": round(lag_s_max, 3),
                "log_lines": len(lines),
                "log": lines[:12],
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
