"""What is announced, and what is believed of others' announcements: without a network."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.ids import Boot, MeshName, NodeId
from mesh.transport.adverts import TXT_BYTES_MAX, Advert, Sighting, read_txt, txt_of
from mesh.transport.interfaces import chosen_interfaces, local_addresses, missing_names
from mesh.wire import PROTOCOL

ADVERT = Advert(
    mesh=MeshName("home"), fingerprint="0123456789abcdef", node=NodeId("pi-4-3f9a2c"), boot=Boot("0badcafe"),
    incarnation=7, port=8470, addresses=("192.0.2.7", "fe80::1%3"), broker_epoch=4,
    broker_host=NodeId("jetson-17aa03"), broker_port=8883,
)  # fmt: skip
TXT = txt_of(ADVERT)


def read(txt: dict[str, str | None], node: str = ADVERT.node, port: int | None = 8470) -> Sighting | None:
    return read_txt(node, port, ADVERT.addresses, txt)


def test_what_one_node_announces_another_reads() -> None:
    assert read({**TXT}) == Sighting(ADVERT, ADVERT.addresses, PROTOCOL)


def test_the_longest_advert_fits_the_record() -> None:
    longest = Advert(
        mesh=MeshName("m" * 63), fingerprint="f" * 64, node=NodeId("n" * 63), boot=Boot("b" * 63),
        incarnation=2**53 - 1, port=65535, broker_epoch=2**53 - 1, broker_host=NodeId("h" * 63),
        broker_port=65535,
    )  # fmt: skip
    txt = txt_of(longest)
    assert sum(len(f"{key}={text}") + 1 for key, text in txt.items()) <= TXT_BYTES_MAX
    assert read_txt(longest.node, 65535, (), txt) == Sighting(longest, (), PROTOCOL)


def test_a_later_version_may_say_more() -> None:
    sighting = read({**TXT, "v": "9", "colour": "blue", "flag": None})
    assert sighting is not None
    assert (sighting.advert, sighting.protocol) == (ADVERT, 9)


def test_a_node_without_a_broker_says_so() -> None:
    txt = {key: text for key, text in TXT.items() if key != "bh"} | {"be": "0", "bp": "0"}
    sighting = read({**txt})
    assert sighting is not None
    assert (sighting.advert.broker_host, sighting.advert.broker_epoch) == (None, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"v": None}, {"v": ""}, {"v": "-1"}, {"v": "1.0"}, {"v": "१"}, {"v": "9" * 5000},
        {"mesh": ""}, {"mesh": "a/b"}, {"mesh": "x" * 64}, {"mesh": None}, {"mesh": "#"},
        {"fp": ""}, {"fp": "xyz"}, {"fp": "a" * 65}, {"boot": ""}, {"boot": "a b"},
        {"inc": str(2**53)}, {"inc": "NaN"}, {"be": "-1"}, {"bh": ""}, {"bh": None}, {"bh": "+"},
        {"bp": "65536"},
    ],
)  # fmt: skip
def test_a_record_with_one_wrong_field_is_no_sighting(change: dict[str, str | None]) -> None:
    assert read({**TXT, **change}) is None


@pytest.mark.parametrize("missing", [key for key in TXT if key != "bh"])
def test_a_record_with_a_missing_field_is_no_sighting(missing: str) -> None:
    assert read({key: text for key, text in TXT.items() if key != missing}) is None


@pytest.mark.parametrize(("node", "port"), [("", 1), ("a.b", 1), ("pi", 0), ("pi", None), ("pi", 65536)])
def test_a_service_without_a_usable_name_or_port_is_no_sighting(node: str, port: int | None) -> None:
    assert read({**TXT}, node=node, port=port) is None


@given(
    st.text(),
    st.none() | st.integers(-(2**70), 2**70),
    st.lists(st.text(max_size=50), max_size=40),
    st.dictionaries(st.sampled_from([*TXT, "else"]) | st.text(), st.none() | st.text()),
)
def test_no_record_makes_reading_fail(
    node: str, port: int | None, addresses: list[str], txt: dict[str, str | None]
) -> None:
    for properties in (txt, {**TXT, **txt}):
        for name in (node, ADVERT.node):
            sighting = read_txt(name, port, addresses, properties)
            assert sighting is None or len(sighting.addresses) <= 16


def test_an_advert_cannot_hold_what_could_not_be_announced() -> None:
    fields = {
        "mesh": "home", "fingerprint": "ab", "node": "pi", "boot": "b", "incarnation": 1, "port": 8470,
    }  # fmt: skip
    Advert(**fields)
    for wrong in ({"port": 0}, {"node": "Ü"}, {"fingerprint": "secret key"}, {"addresses": ("x",) * 17}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Advert(**{**fields, **wrong})


def test_loopback_is_used_only_when_it_is_named_or_alone() -> None:
    assert local_addresses(("lo",)) == ("127.0.0.1",)
    assert local_addresses(("127.0.0.1",)) == ("127.0.0.1",)
    assert local_addresses(("no-such-interface",)) == ("127.0.0.1",)
    real = chosen_interfaces()
    assert not any(interface.name == "lo" for interface in real)
    assert ("127.0.0.1" in local_addresses()) == (not real)


def test_what_nobody_has_is_named_missing() -> None:
    assert missing_names(("lo", "127.0.0.1", "wlan9", "203.0.113.9")) == ("wlan9", "203.0.113.9")
    assert missing_names(None) == ()
