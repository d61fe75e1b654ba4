"""Settings: who wins, what is refused, and that nothing secret is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mesh.errors import ConfigError
from mesh.transport.streams import DEFAULT_PORT
from node.settings import (
    SEED_PORT,
    TABLE,
    HostPort,
    Loaded,
    broker_text,
    load_settings,
    parse_broker,
    parse_host_port,
    read_settings,
)

STATE = Path("/var/lib/edgemesh")


def load(
    flags: dict[str, Any] | None = None, environ: dict[str, str] | None = None, toml: str | None = None
) -> Loaded:
    return load_settings(flags or {}, environ or {}, toml, state_dir=STATE)


@pytest.mark.parametrize(
    ("flag", "variable", "toml", "value", "origin"),
    [
        (None, None, None, SEED_PORT, "default"),
        (None, None, "port = 1001", 1001, "file"),
        (None, "1002", "port = 1001", 1002, "environment"),
        ("1003", "1002", "port = 1001", 1003, "flag"),
        ("1003", None, None, 1003, "flag"),
    ],
)
def test_a_flag_beats_the_environment_beats_the_file(
    flag: str | None, variable: str | None, toml: str | None, value: int, origin: str
) -> None:
    loaded = load({"port": flag}, {"EDGEMESH_PORT": variable} if variable else {}, toml)
    assert (loaded.settings.port, loaded.origin["port"]) == (value, origin)


def test_without_any_source_every_value_is_the_default_and_says_so() -> None:
    loaded = load()
    assert set(loaded.origin.values()) == {"default"}
    assert set(loaded.origin) == {row.name for row in TABLE}
    assert loaded.settings.state_dir == STATE
    assert loaded.settings.mesh == "home"
    assert loaded.settings.compute


def test_every_setting_can_be_set_by_each_source() -> None:
    values: dict[str, Any] = {
        "mesh": "lab", "code": "em1-x", "new": True, "name": "pi", "seeds": ["a:1", "b"], "broker": "mqtt://b",
        "broker_kind": "amqtt", "interfaces": ["eth0"], "port": 1, "plain": True, "plain_port": 2,
        "compute": False, "model": "echo", "precision": "int8", "hold": "all", "top_layers": 2,
        "threads": 3, "adapter_memory": "1MB", "adapter_disk": "2GB", "adapter_replicas": "all",
        "feature_memory": "512MiB", "feature_disk": 4_000_000, "slowdown": 2.5, "policy": "edf+drop",
        "headless": True,
        "log_format": "json", "log_level": "debug", "state_dir": "/s",
    }  # fmt: skip
    assert set(values) == {row.name for row in TABLE}
    for name, value in values.items():
        as_text = ",".join(value) if isinstance(value, list) else str(value).lower()
        as_toml = f'"{value}"' if isinstance(value, str) else str(value).lower().replace("'", '"')
        by_flag = load({name: value}).settings
        by_environment = load({}, {f"EDGEMESH_{name.upper()}": as_text}).settings
        by_file = load({}, {}, f"{name} = {as_toml}").settings
        assert getattr(by_flag, name) == getattr(by_environment, name) == getattr(by_file, name), name


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("512MB", 512_000_000),
        ("2 GiB", 2 * 2**30),
        ("1.5g", 1_500_000_000),
        ("64kib", 65_536),
        ("1000", 1000),
        ("0", 0),
        ("7b", 7),
        (12, 12),
    ],
)
def test_sizes_are_written_as_people_write_them(text: Any, n_bytes: int) -> None:
    assert load({"feature_memory": text}).settings.feature_memory == n_bytes


def test_a_misspelt_name_is_refused_and_the_nearest_is_shown() -> None:
    with pytest.raises(ConfigError, match=r"'modle'.*did you mean 'model'"):
        load(toml='modle = "x"')
    with pytest.raises(ConfigError, match=r"EDGEMESH_BROKR.*did you mean 'EDGEMESH_BROKER'"):
        load(environ={"EDGEMESH_BROKR": "mqtt://x"})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("port", 65536, "port from 0"),
        ("port", -1, "port from 0"),
        ("port", True, "port from 0"),
        ("port", "many", "port from 0"),
        ("mesh", "Home", "a-z, 0-9"),
        ("mesh", "a/b", "a-z, 0-9"),
        ("mesh", "", "not empty"),
        ("compute", "perhaps", "true or false"),
        ("log_format", "xml", "text, json"),
        ("broker_kind", "emqx", "auto, mosquitto, amqtt"),
        ("precision", "fp8", "auto, fp32, bf16, fp16, int8, int4"),
        ("threads", 0, "threads from 1"),
        ("threads", "two", "threads from 1"),
        ("slowdown", 0.5, "from 1"),
        ("policy", "best", "no policy 'best': there are vdf, "),
        ("slowdown", "very", "from 1"),
        ("slowdown", True, "from 1"),
        ("slowdown", "nan", "from 1"),
        ("slowdown", 1e9, "from 1"),
        ("feature_disk", "much", "512MB or 2GiB"),
        ("feature_disk", -1, "512MB or 2GiB"),
        ("feature_disk", True, "512MB or 2GiB"),
        ("feature_disk", "1e30", "512MB or 2GiB"),
        ("feature_disk", "9000TB", "512MB or 2GiB"),
        ("adapter_memory", "", "512MB or 2GiB"),
        ("seeds", 7, "a list"),
        ("seeds", ["host:0"], "HOST or HOST:PORT"),
        ("seeds", ["mqtt://h:1"], "HOST or HOST:PORT"),
        ("seeds", ["h:99999"], "HOST or HOST:PORT"),
        ("broker", "http://b", "mqtt\\[s\\]://"),
        ("broker", "b.lan:1883", "mqtt\\[s\\]://"),
        ("broker", "mqtt://", "names no host"),
        ("broker", "mqtt://h:77777", "cannot be"),
        ("broker", "mqtt://h/topic", "more than a host"),
    ],
)
def test_a_wrong_value_is_refused_in_words_that_name_the_right_form(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        load({name: value})
    assert str(caught.value).startswith("--")  # the reader knows which flag


def test_a_node_without_compute_cannot_play_a_slower_one() -> None:
    with pytest.raises(ConfigError, match="--slowdown"):
        load({"compute": False, "slowdown": 4})


def test_a_wrong_broker_url_is_not_repeated_because_it_may_hold_a_password() -> None:
    with pytest.raises(ConfigError) as caught:
        load({}, {"EDGEMESH_BROKER": "mqtt://me:s3cret@h/topic"})
    assert "s3cret" not in str(caught.value)


def test_secrets_are_in_no_repr() -> None:
    settings = load({"code": "em1-secret", "broker": "mqtts://me:s3cret@h"}).settings
    assert "secret" not in repr(settings)
    assert "s3cret" not in repr(settings)


@pytest.mark.parametrize(
    ("url", "address", "port", "tls", "username", "password", "shown"),
    [
        ("mqtt://h", "h", 1883, False, None, None, "mqtt://h:1883"),
        ("mqtts://h", "h", 8883, True, None, None, "mqtts://h:8883"),
        ("mqtts://me:p%40ss@h:1", "h", 1, True, "me", "p@ss", "mqtts://me:…@h:1"),
        ("mqtt://me@[fe80::1]:2/", "fe80::1", 2, False, "me", None, "mqtt://me@[fe80::1]:2"),
    ],
)
def test_broker_urls(
    url: str, address: str, port: int, tls: bool, username: str | None, password: str | None, shown: str
) -> None:
    ref = parse_broker(url)
    assert (ref.addresses, ref.port, ref.tls) == ((address,), port, tls)
    assert (ref.username, ref.password) == (username, password)
    assert (ref.epoch, ref.host) == (0, None)  # the site's own never competes
    assert broker_text(ref) == shown


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("pi.local", HostPort("pi.local", SEED_PORT)),
        ("10.0.0.1:7", HostPort("10.0.0.1", 7)),
        ("[fe80::1]:7", HostPort("fe80::1", 7)),
    ],
)
def test_seeds(text: str, place: HostPort) -> None:
    assert parse_host_port(text) == place
    assert parse_host_port(str(place)) == place


def test_a_seed_without_a_port_is_the_first_node_of_a_machine() -> None:
    assert SEED_PORT == DEFAULT_PORT


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"new": True, "code": "em1-x"}, "--new"),
        ({"plain": False, "plain_port": 1883}, "--no-plain"),
        ({"port": 1883, "plain_port": 1883}, "both 1883"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load(flags)


def test_a_named_file_must_exist_and_the_default_one_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert read_settings({}, {}).origin["mesh"] == "default"
    with pytest.raises(ConfigError, match="no file at"):
        read_settings({}, {"EDGEMESH_CONFIG": str(tmp_path / "none.toml")})
    with pytest.raises(ConfigError, match="no file at"):
        read_settings({}, {}, tmp_path / "none.toml")


def test_the_default_file_is_read_and_named_in_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / "edgemesh" / "config.toml"
    file.parent.mkdir()
    file.write_text('mesh = "lab"')
    assert read_settings({}, {}).settings.mesh == "lab"
    file.write_text("port = 'x'")
    with pytest.raises(ConfigError, match=str(file)):
        read_settings({}, {})
    file.write_text("[broken")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_settings({}, {})
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read"):
        read_settings({}, {})
