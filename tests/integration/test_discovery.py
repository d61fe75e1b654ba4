"""mDNS for real: on loopback within this process, and on a small LAN of network namespaces."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from queue import Empty, Queue
from typing import IO, Any

import pytest

from mesh.ids import Boot, MeshName, NodeId
from mesh.transport.adverts import Advert, Gone, Sighting
from mesh.transport.discovery import Discovery, scan
from tests.integration.namespaces import Host, Lan, why_not

LOOPBACK = ("lo",)
_WHY_NOT = why_not()
on_a_lan = pytest.mark.skipif(_WHY_NOT is not None, reason=str(_WHY_NOT))

# ── on loopback: names carry this process's id, because other meshes may run on this machine ──────────


def advert_of(name: str, **fields: Any) -> Advert:
    some = Advert(
        mesh=MeshName("home"), fingerprint="ab12", node=NodeId(f"{name}-{os.getpid()}"),
        boot=Boot(f"b-{name}"), incarnation=1, port=8470,
    )  # fmt: skip
    return replace(some, **fields)


class Watch:
    """Everything one Discovery has seen, in order."""

    def __init__(self, discovery: Discovery) -> None:
        self.discovery = discovery
        self.seen: list[Sighting | Gone] = []
        self._more = asyncio.Condition()

    async def read(self) -> None:
        async for news in self.discovery.sightings():
            async with self._more:
                self.seen.append(news)
                self._more.notify_all()

    async def until(self, is_it: Callable[[Sighting | Gone], bool], within_s: float) -> Sighting | Gone:
        async with asyncio.timeout(within_s), self._more:
            await self._more.wait_for(lambda: any(map(is_it, self.seen)))
        return next(filter(is_it, self.seen))


@asynccontextmanager
async def watching(advert: Advert | None, interfaces: tuple[str, ...] = LOOPBACK) -> AsyncIterator[Watch]:
    async with Discovery(advert, interfaces) as discovery:
        watch = Watch(discovery)
        reading = asyncio.create_task(watch.read())
        try:
            yield watch
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


def shows(advert: Advert) -> Callable[[Sighting | Gone], bool]:
    """A sighting of this very advert, wherever it may be."""
    return lambda news: isinstance(news, Sighting) and replace(news.advert, addresses=()) == advert


async def test_newcomer_and_old_hand_see_each_other_within_a_second() -> None:
    one, two = advert_of("one"), advert_of("two", broker_epoch=3, broker_host=NodeId("pi"), broker_port=1883)
    async with watching(one) as old:
        assert old.discovery._announcing is not None
        await asyncio.wait([old.discovery._announcing], timeout=5)  # no help from its first announcements
        async with watching(two) as new:
            found = await old.until(shows(two), 1)
            await new.until(shows(one), 1)
    assert isinstance(found, Sighting)
    assert found.addresses == ("127.0.0.1",)


async def test_three_that_start_at_once_all_see_each_other_within_a_second() -> None:
    one, two, three = advert_of("one"), advert_of("two"), advert_of("three")
    async with watching(one) as a, watching(two) as b, watching(three) as c:
        for watch, others in ((a, (two, three)), (b, (one, three)), (c, (one, two))):
            for other in others:
                await watch.until(shows(other), 1)


async def test_an_update_is_seen_within_a_second_and_the_last_one_counts() -> None:
    one, two = advert_of("one"), advert_of("two")
    async with watching(one) as a, watching(two) as b:
        await a.until(shows(two), 1)
        for epoch in range(1, 6):
            await b.discovery.update(
                replace(two, broker_epoch=epoch, broker_host=NodeId("pi"), broker_port=epoch)
            )
        await a.until(shows(replace(two, broker_epoch=5, broker_host=NodeId("pi"), broker_port=5)), 1)
        assert not any(isinstance(news, Gone) for news in a.seen if node_of(news) == two.node)


async def test_a_goodbye_is_seen() -> None:
    one, two = advert_of("one"), advert_of("two")
    async with watching(one) as a:
        async with watching(two):
            await a.until(shows(two), 1)
        assert await a.until(lambda news: news == Gone(two.node), 2)


async def test_one_that_comes_back_is_seen_again() -> None:
    one, two = advert_of("one"), advert_of("two")
    async with watching(one) as a:
        for boot in ("b-1", "b-2", "b-3"):
            life = replace(two, boot=Boot(boot))
            async with watching(life):
                await a.until(shows(life), 2)


async def test_a_mesh_of_the_same_name_and_another_key_is_told_apart() -> None:
    ours, theirs = advert_of("one"), advert_of("two", fingerprint="cd34")
    async with watching(ours) as a, watching(theirs):
        news = await a.until(lambda news: node_of(news) == theirs.node, 1)
    assert isinstance(news, Sighting)
    assert (news.advert.mesh, news.advert.fingerprint) == (ours.mesh, "cd34")


async def test_a_node_never_sees_itself_but_sees_its_clone() -> None:
    me, clone = advert_of("one"), advert_of("one", boot=Boot("b-clone"))
    async with watching(me) as a:
        async with watching(clone) as b:
            await a.until(shows(clone), 1)
            await b.until(shows(me), 1)
        assert not any(map(shows(me), a.seen))
        assert not any(map(shows(clone), b.seen))


async def test_nobody_who_only_listens_is_seen() -> None:
    one, two = advert_of("one"), advert_of("two")
    async with watching(one) as a, watching(None) as listener:
        await listener.until(shows(one), 2)
        async with watching(two):
            await a.until(shows(two), 1)
        assert {node_of(news) for news in a.seen if str(os.getpid()) in node_of(news)} == {two.node}


async def test_a_scan_ends_when_it_has_found_its_mesh() -> None:
    mesh = f"m-{os.getpid()}"
    one, other = advert_of("one", mesh=MeshName(mesh)), advert_of("two")
    async with watching(one), watching(other):
        began = time.monotonic()
        found = await scan(mesh, 10, LOOPBACK)
        assert time.monotonic() - began < 4
    assert [sighting.advert.node for sighting in found] == [one.node]
    assert await scan(f"{mesh}-nobody", 0.2, LOOPBACK) == []


def node_of(news: Sighting | Gone) -> str:
    return news.node if isinstance(news, Gone) else news.advert.node


def test_a_flood_of_forged_and_broken_announcements_is_bounded() -> None:
    """In a network of its own: forged records stay in every listener's cache for a quarter of an hour."""
    unshare = ["unshare", "-n"] if os.geteuid() == 0 else ["unshare", "-rn"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("no private network namespace: unshare is missing or not permitted")
    script = f"ip link set lo up && exec {sys.executable} -m tests.integration.mdns_flood"
    done = subprocess.run([*unshare, "sh", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["peer_seen_before"] and seen["peer_update_seen_after"], seen
    assert seen["forged_arrived"] >= 500, seen  # else this tests nothing
    assert seen["forged_waiting"] <= 1024, seen
    assert seen["grown_mb"] < 40, seen
    assert seen["lag_s_max"] < 0.5, seen
    assert seen["log_lines"] <= 10, seen


# ── on a LAN ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def lan() -> Iterator[Lan]:
    with Lan() as lan:
        yield lan


def _read(stream: IO[str], take: Callable[[str], None]) -> None:
    for line in stream:
        take(line)


class Device:
    """A ``lan_node`` process and what it printed."""

    def __init__(self, host: Host, *options: str) -> None:
        self.process = host.start([sys.executable, "-m", "tests.integration.lan_node", *options])
        self.events: list[dict[str, Any]] = []
        self._lines: Queue[str] = Queue()
        self._log: list[str] = []
        assert self.process.stdout is not None and self.process.stderr is not None
        takers = ((self.process.stdout, self._lines.put), (self.process.stderr, self._log.append))
        self._readers = [threading.Thread(target=_read, args=pair, daemon=True) for pair in takers]
        for reader in self._readers:
            reader.start()

    def end(self) -> None:
        """Stop it and read to the end of its log."""
        self.process.terminate()
        for reader in self._readers:
            reader.join(5)

    @property
    def log(self) -> str:
        return "".join(self._log)

    def expect(self, within_s: float, **fields: Any) -> dict[str, Any]:
        """The first event, past or coming, with these fields."""
        over_at = time.monotonic() + within_s
        checked = 0
        while True:
            for event in self.events[checked:]:
                if fields.items() <= event.items():
                    return event
            checked = len(self.events)
            try:
                line = self._lines.get(timeout=max(0.0, over_at - time.monotonic()))
            except Empty:
                raise AssertionError(
                    f"no {fields} within {within_s} s; saw {self.events}; {self.log}"
                ) from None
            self.events.append(json.loads(line))

    def ready(self) -> int:
        return int(self.expect(10, event="ready")["port"])


@on_a_lan
def test_devices_on_one_network_find_each_other_and_hide_their_containers(lan: Lan) -> None:
    hosts = {name: lan.host(name, f"10.77.0.{k}/24") for k, name in enumerate(("pi", "nuc", "mac"), start=1)}
    # A bridge with something plugged in, as `docker run` leaves it.
    for words in (
        "link add docker0 up type bridge",
        "address add 172.17.0.1/16 dev docker0",
        "link add veth1a2b3c up type veth peer name inside",
        "link set veth1a2b3c master docker0",
        "link set inside up",
    ):
        hosts["pi"].ip(*words.split())
    devices = {name: Device(host, name) for name, host in hosts.items()}
    for device in devices.values():
        device.ready()
    for name, device in devices.items():
        for other in devices.keys() - {name}:
            device.expect(3, event="sighting", node=other)
            device.expect(3, event="hello", node=other)
    addresses = devices["nuc"].expect(0, event="sighting", node="pi")["addresses"]
    assert "10.77.0.1" in addresses
    assert not any(address.startswith("172.17.") for address in addresses)
    told = Device(hosts["pi"], "pi2", "--interfaces", "eth0", "docker0")
    told.ready()
    assert "172.17.0.1" in devices["nuc"].expect(3, event="sighting", node="pi2")["addresses"]


@on_a_lan
def test_where_multicast_is_blocked_a_seed_works(lan: Lan) -> None:
    pi, nuc = lan.host("pi", "10.77.0.1/24"), lan.host("nuc", "10.77.0.2/24")
    lan.drop_multicast()
    one = Device(pi, "pi")
    port = one.ready()
    two = Device(nuc, "nuc", "--ask", f"10.77.0.1:{port}")
    two.expect(5, event="hello", node="pi")
    with pytest.raises(AssertionError, match=r"no .*sighting"):
        two.expect(1.5, event="sighting")


@on_a_lan
def test_a_cable_plugged_in_later_is_noticed(lan: Lan) -> None:
    pi, nuc = lan.host("pi", is_cabled=False), lan.host("nuc", "10.77.0.2/24")
    late, early = Device(pi, "pi"), Device(nuc, "nuc")
    late.ready(), early.ready()
    lan.plug(pi, "10.77.0.1/24")
    late.expect(15, event="sighting", node="nuc")
    seen = early.expect(15, event="sighting", node="pi")
    assert "10.77.0.1" in seen["addresses"]
    early.expect(5, event="hello", node="pi")


@on_a_lan
def test_a_new_address_is_noticed(lan: Lan) -> None:
    pi, nuc = lan.host("pi", "10.77.0.1/24"), lan.host("nuc", "10.77.0.2/24")
    moving, watcher = Device(pi, "pi"), Device(nuc, "nuc")
    moving.ready(), watcher.ready()
    watcher.expect(5, event="hello", node="pi", address="10.77.0.1")
    pi.ip("address", "del", "10.77.0.1/24", "dev", "eth0")  # as a DHCP lease that was not renewed
    pi.ip("address", "add", "10.77.0.9/24", "dev", "eth0")
    watcher.expect(15, event="hello", node="pi", address="10.77.0.9")


@on_a_lan
def test_devices_with_nothing_but_link_local_ipv6_find_each_other(lan: Lan) -> None:
    one, two = Device(lan.host("pi"), "pi"), Device(lan.host("nuc"), "nuc")
    one.ready(), two.ready()
    address = two.expect(5, event="hello", node="pi")["address"]
    assert address.startswith("fe80::") and "%" in address
    one.expect(5, event="hello", node="nuc")


@on_a_lan
def test_on_loopback_nothing_leaves_the_machine(lan: Lan) -> None:
    pi, nuc = lan.host("pi", "10.77.0.1/24"), lan.host("nuc", "10.77.0.2/24")
    ear = Device(nuc, "whisper", "--mute")
    ear.ready()
    whisper, other = Device(pi, "whisper", "--interfaces", "lo"), Device(pi, "other", "--interfaces", "lo")
    whisper.expect(10, event="hello", node="other")
    other.expect(10, event="hello", node="whisper")
    loud = Device(pi, "loud")
    ear.expect(10, event="packet", names_it=False)
    loud.ready()
    with pytest.raises(AssertionError, match="no "):
        ear.expect(1, event="packet", names_it=True)


@on_a_lan
def test_a_machine_without_any_network_starts_and_says_that_it_is_deaf(lan: Lan) -> None:
    device = Device(lan.host("pi", is_cabled=False, has_loopback=False), "pi")
    device.ready()
    device.end()
    assert "cannot use mDNS" in device.log
    assert "--seed" in device.log
