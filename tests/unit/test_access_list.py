"""The access list by itself."""

from __future__ import annotations

import pytest

from mesh.brokers.access import AccessList, anonymous_lines, matches

# -- the access list by itself


@pytest.mark.parametrize(
    ("filter_", "topic", "selects"),
    [
        ("a", "a", True),
        ("a", "a/b", False),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a//c", True),
        ("a/+", "a/b/c", False),
        ("+", "a/b", False),
        ("+/+", "/a", True),
    ],
)
def test_filters_select_as_the_standard_says(filter_: str, topic: str, selects: bool) -> None:
    assert matches(filter_, topic) is selects


def test_the_access_list_reads_as_mosquitto_reads_it() -> None:
    access = AccessList(
        "# a comment\n\ntopic read news/#\ntopic deny news/secret\ntopic open\n"
        "user a\ntopic write mine\npattern readwrite u/%u/#\npattern read c/%c\npattern write all\n"
    )
    assert access.allows(None, "x", "read", "news/today")
    assert not access.allows(None, "x", "write", "news/today")
    assert not access.allows(None, "x", "read", "news/secret")
    assert access.allows(None, "x", "write", "open") and access.allows(None, "x", "read", "open")
    assert not access.allows("a", "x", "read", "news/today")
    assert access.allows("a", "x", "write", "mine") and not access.allows("b", "x", "write", "mine")
    assert access.allows("b", "x", "write", "u/b/y") and not access.allows("b", "x", "write", "u/a/y")
    assert not access.allows(None, "x", "write", "u//y")
    assert access.allows("b", "x", "read", "c/x") and not access.allows("b", "y", "read", "c/x")
    assert access.allows(None, "x", "write", "all")
    assert not access.allows("+", "x", "write", "u/a/y") and not access.allows("b", "#", "read", "c/x")


def test_strangers_get_the_topic_lines_before_the_first_user() -> None:
    text = "topic read a\npattern write all\n user b\ntopic write b\n"
    assert anonymous_lines(text) == "topic read a\n"
