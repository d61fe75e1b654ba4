"""What the operator chose: TOML file < environment < flags, in one frozen ``Settings``.

``TABLE`` is the one list of settings. From a row come the TOML key (its name), the environment
variable (``EDGEMESH_`` and the name in capitals), the flag, the check of the value, the line in
``edgemesh config show`` and the help text. A name that is not in the table is an error that shows the
nearest one, because a setting that is silently ignored is worse than none.

``load_settings`` is pure; ``read_settings`` is the edge that reads the file and the environment.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from mesh.errors import ConfigError
from mesh.facts import BrokerRef
from mesh.ids import MeshName, is_id
from mesh.messages.node import SLOWDOWN_MAX
from node.state import DEFAULT_MESH, default_config_file, default_state_dir

__all__ = [
    "TABLE",
    "HostPort",
    "Loaded",
    "Setting",
    "Settings",
    "broker_text",
    "load_settings",
    "parse_broker",
    "parse_host_port",
    "read_settings",
]

ENV_PREFIX = "EDGEMESH_"
CONFIG_VARIABLE = "EDGEMESH_CONFIG"
CONFIG_BYTES_MAX = 1024 * 1024  # a full table is about 1 KiB; anything near this is another file
SEED_PORT = 8470
"""``mesh.transport.streams.DEFAULT_PORT``, without importing its HTTP library into every command."""
THREADS_MAX = 1024
LAYERS_MAX = 1024
SIZE_MAX_BYTES = 10**15
TEST_VARIABLES = frozenset({"EDGEMESH_LONG"})  # the test suite's own

BrokerKind = Literal["auto", "mosquitto", "amqtt"]
Precision = Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"]
AdapterReplicas = Literal["auto", "all", "demand"]
Hold = Literal["auto", "all", "top"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class HostPort:
    """Where a peer's data plane listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One process's choices. ``TABLE`` explains each; nothing here changes while the process runs."""

    state_dir: Path
    mesh: MeshName = DEFAULT_MESH
    code: str | None = field(default=None, repr=False)
    new: bool = False
    name: str | None = None
    seeds: tuple[HostPort, ...] = ()
    broker: BrokerRef | None = field(default=None, repr=False)
    """The site's own broker (``epoch`` 0, ``host`` ``None``); ``None``: the mesh starts its own."""
    broker_kind: BrokerKind = "auto"
    interfaces: tuple[str, ...] | None = None
    """Network interfaces by name or address; ``None``: every real one."""
    port: int = SEED_PORT
    plain: bool = True
    plain_port: int = 0
    compute: bool = True
    model: str | None = None
    """``None``: the catalogue's default."""
    precision: Precision = "auto"
    hold: Hold = "auto"
    """``top``: load no more than ``top_layers``; ``auto``: only where the whole model finds no memory."""
    top_layers: int = 4
    threads: int | None = None
    """``None``: as many as there are physical cores."""
    adapter_memory: int = 512_000_000
    """Bytes, as all sizes here."""
    adapter_disk: int = 1_000_000_000
    """For adapters pulled from other nodes and for older versions."""
    adapter_replicas: AdapterReplicas = "auto"
    feature_memory: int = 512_000_000
    feature_disk: int = 4_000_000_000
    slowdown: float = 1.0
    """1 = none."""
    policy: str = "foresight"
    """By which this node places tasks while it coordinates."""
    headless: bool = False
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One row of the table. ``parse`` takes a TOML value or text and raises ``ValueError`` in words."""

    name: str
    parse: Callable[[Any], Any]
    help: str
    metavar: str = ""
    """Shown for the value; empty for a switch, which takes none."""
    flag: str = ""
    """The flag if it is not just the name: ``--no-compute`` sets ``compute`` to false."""
    flag_sets: object = True
    """For a switch: what giving its flag sets."""
    is_many: bool = False
    is_secret: bool = False

    @property
    def option(self) -> str:
        return self.flag or "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and where each came from: ``flag``, ``environment``, ``file`` or ``default``."""

    settings: Settings
    origin: Mapping[str, str]


# ── values ──────────────────────────────────────────────────────────────────────────────────────────


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"must be a text that is not empty, got {value!r}")
    return value.strip()


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError(f"must be true or false, got {value!r}")
    return word in ("1", "true", "yes", "on")


def _port(value: Any) -> int:
    try:
        port = int(value) if not isinstance(value, bool) else -1
    except (TypeError, ValueError):
        port = -1
    if not 0 <= port <= 65535:
        raise ValueError(f"must be a port from 0 (any free one) to 65535, got {value!r}")
    return port


def _threads(value: Any) -> int:
    try:
        threads = int(value) if not isinstance(value, bool) else 0
    except (TypeError, ValueError):
        threads = 0
    if not 1 <= threads <= THREADS_MAX:
        raise ValueError(f"must be a number of threads from 1 to {THREADS_MAX}, got {value!r}")
    return threads


def _top_layers(value: Any) -> int:
    try:
        layers = int(value) if not isinstance(value, bool) else 0
    except (TypeError, ValueError):
        layers = 0
    if not 1 <= layers <= LAYERS_MAX:
        raise ValueError(f"must be a number of layers from 1 to {LAYERS_MAX}, got {value!r}")
    return layers


def _slowdown(value: Any) -> float:
    try:
        slowdown = float(value) if not isinstance(value, bool) else 0.0
    except (TypeError, ValueError):
        slowdown = 0.0
    if not 1 <= slowdown <= SLOWDOWN_MAX:
        raise ValueError(f"must be a number from 1 (none) to {SLOWDOWN_MAX:g}, got {value!r}")
    return slowdown


def _policy(value: Any) -> str:
    from coordinator.policy.policies import policy_named  # brings numpy: not for every command

    return policy_named(_text(value)).name


def _size(value: Any) -> int:
    """Bytes from a number, or from text such as ``512MB`` (decimal) or ``2GiB`` (binary)."""
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found:
        base = 1024 if found["binary"] else 1000
        size: float = float(found["number"]) * base ** " kmgt".index((found["prefix"] or " ").lower())
    elif isinstance(value, int) and not isinstance(value, bool):
        size = value
    else:
        size = -1
    if not 0 <= size <= SIZE_MAX_BYTES:
        raise ValueError(f"must be a size such as 512MB or 2GiB, got {value!r}")
    return round(size)


_SIZE = re.compile(r"(?P<number>\d+(\.\d+)?) *((?P<prefix>[kmgt])(?P<binary>i)?)?b?", re.IGNORECASE)


def _one_of(*words: str) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}; got {value!r}")
        return str(value)

    return parse


def _mesh_name(value: Any) -> MeshName:
    text = _text(value)
    if not is_id(text):
        raise ValueError(f"must be 1 to 63 of a-z, 0-9 and '-', not at an end; got {text!r}")
    return MeshName(text)


def _texts(value: Any) -> tuple[str, ...]:
    """A TOML list, a flag given several times, or one text with commas."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise ValueError(f"must be a list, or one text with commas; got {value!r}")
    return tuple(_text(part) for part in parts if part != "")


def _path(value: Any) -> Path:
    return Path(_text(value)).expanduser().absolute()


def parse_host_port(value: Any) -> HostPort:
    """``pi.local``, ``pi.local:8470`` or ``[fe80::1]:8470``; the port of a machine's first node by default.

    Raises:
        ValueError: Not that form; the text names it.
    """
    text = _text(value)
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port == 0 or parts.path or parts.query or "@" in text:
        raise ValueError(
            f"must be HOST or HOST:PORT, such as 192.168.1.20:{SEED_PORT} or [fe80::1]; got {text!r}"
        )
    return HostPort(host, port or SEED_PORT)


BROKER_FORM = "mqtt[s]://[USER:PASSWORD@]HOST[:PORT], such as mqtts://edge:secret@broker.lan:8883"


def parse_broker(value: Any) -> BrokerRef:
    """The site's own broker from its URL. Ports default to 1883 (``mqtt``) and 8883 (``mqtts``).

    Raises:
        ValueError: Not that form. The text never repeats the URL, which may hold a password.
    """
    text = _text(value)
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ValueError(f"has a host or port that cannot be; write {BROKER_FORM}") from None
    if parts.scheme not in ("mqtt", "mqtts"):
        raise ValueError(f"starts with neither mqtt:// nor mqtts://; write {BROKER_FORM}")
    if not host:
        raise ValueError(f"names no host; write {BROKER_FORM}")
    if port == 0 or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(f"has more than a host and a port from 1 to 65535; write {BROKER_FORM}")
    tls = parts.scheme == "mqtts"
    return BrokerRef(
        epoch=0,
        host=None,
        addresses=(host,),
        port=port or (8883 if tls else 1883),
        tls=tls,
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
    )


def broker_text(broker: BrokerRef) -> str:
    """The broker's URL without its password: fit for a screen, a log and ``config show``."""
    user = f"{broker.username}:…@" if broker.password else f"{broker.username}@" if broker.username else ""
    address = HostPort(broker.addresses[0] if broker.addresses else "?", broker.port)
    return f"{'mqtts' if broker.tls else 'mqtt'}://{user}{address}"


def _seeds(value: Any) -> tuple[HostPort, ...]:
    return tuple(parse_host_port(text) for text in _texts(value))


TABLE: tuple[Setting, ...] = (
    Setting(name="mesh", parse=_mesh_name, metavar="NAME",
            help="Name of the mesh [default: the only one this machine knows, else 'home']."),
    Setting(name="code", parse=_text, metavar="CODE", is_secret=True,
            help="Join code of the mesh, from `edgemesh token` on a device that is in; '-' asks for it."),
    Setting(name="new", parse=_switch,
            help="Create a new mesh although one of this name is visible."),
    Setting(name="name", parse=_text, metavar="TEXT",
            help="What to call this node [default: the host's name]."),
    Setting(name="seeds", parse=_seeds, metavar="HOST[:PORT]", flag="--seed", is_many=True,
            help="A peer to ask where multicast is blocked. Repeatable."),
    Setting(name="broker", parse=parse_broker, metavar="URL", is_secret=True,
            help="Use the site's own broker: mqtt[s]://[USER:PASSWORD@]HOST[:PORT]."),
    Setting(name="broker_kind", parse=_one_of("auto", "mosquitto", "amqtt"), metavar="auto|mosquitto|amqtt",
            help="What to start when this node hosts the mesh's broker; auto: mosquitto if installed."),
    Setting(name="interfaces", parse=_texts, metavar="NAME", flag="--interface", is_many=True,
            help="Use only this network interface (name or address). Repeatable [default: every real one]."),
    Setting(name="port", parse=_port, metavar="PORT",
            help="Where the data plane listens; any free port if taken [default: 8470]."),
    Setting(name="plain", parse=_switch, flag="--no-plain", flag_sets=False,
            help="No unencrypted MQTT listener on loopback (for mosquitto_pub on this machine)."),
    Setting(name="plain_port", parse=_port, metavar="PORT",
            help="Port of that listener [default: any free one; `edgemesh mqtt` tells it]."),
    Setting(name="compute", parse=_switch, flag="--no-compute", flag_sets=False,
            help="Load no model: relay, coordinate and host the broker only."),
    Setting(name="model", parse=_text, metavar="NAME|PATH",
            help="Catalogue name, hub id, directory, GGUF file, or mesh:NAME for what others serve "
                 "[default: the catalogue's default]."),
    Setting(name="precision", parse=_one_of("auto", "fp32", "bf16", "fp16", "int8", "int4"),
            metavar="auto|fp32|bf16|fp16|int8|int4",
            help="Number format of the weights; auto: by free memory and measured speed [default: auto]."),
    Setting(name="hold", parse=_one_of("auto", "all", "top"), metavar="auto|all|top",
            help="Which layers to load; top: the upper ones, to tune and to read texts from feature maps of "
                 "other nodes; auto: all if they find memory [default: auto]."),
    Setting(name="top_layers", parse=_top_layers, metavar="K",
            help="How many layers a node loads that holds the top [default: 4]."),
    Setting(name="threads", parse=_threads, metavar="N",
            help="Most threads to compute with; fewer while others need them [default: all cores]."),
    Setting(name="adapter_memory", parse=_size, metavar="SIZE",
            help="Memory for adapters; those not in use leave first [default: 512MB]."),
    Setting(name="adapter_disk", parse=_size, metavar="SIZE",
            help="Disk space for adapters from other nodes; unused ones leave first [default: 1GB]."),
    Setting(name="adapter_replicas", parse=_one_of("auto", "all", "demand"), metavar="auto|all|demand",
            help="Which adapters of the mesh to have here; auto: those up to 32 MB [default: auto]."),
    Setting(name="feature_memory", parse=_size, metavar="SIZE",
            help="Memory for feature maps, the cache of tuning [default: 512MB]."),
    Setting(name="feature_disk", parse=_size, metavar="SIZE",
            help="Disk space for feature maps [default: 4GB]."),
    Setting(name="slowdown", parse=_slowdown, metavar="FACTOR",
            help="Play a device this many times slower (tests, demos); shown as emulated [default: 1]."),
    Setting(name="policy", parse=_policy, metavar="NAME",
            help="How tasks are placed while it coordinates, such as edf+drop+chunk [default: foresight]."),
    Setting(name="headless", parse=_switch,
            help="Plain log lines even on a terminal."),
    Setting(name="log_format", parse=_one_of("text", "json"), metavar="text|json",
            help="Form of the log lines [default: text]."),
    Setting(name="log_level", parse=_one_of("debug", "info", "warning", "error"),
            metavar="debug|info|warning|error", help="Least important line to log [default: info]."),
    Setting(name="state_dir", parse=_path, metavar="DIR",
            help="Where keys, journals and models live on this machine."),
)  # fmt: skip

ROWS: Mapping[str, Setting] = {row.name: row for row in TABLE}
assert set(ROWS) == {f.name for f in fields(Settings)}, "one row for each field"


# ── loading ─────────────────────────────────────────────────────────────────────────────────────────


def load_settings(
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    toml_text: str | None,
    *,
    state_dir: Path,
    file_name: str = "config.toml",
) -> Loaded:
    """The settings these sources give together; a flag beats the environment beats the file.

    Args:
        flags: Values by setting name; a flag that was not given is left out or ``None``.
        environ: The process environment; only ``EDGEMESH_*`` is looked at.
        toml_text: The configuration file, ``None`` if there is none.
        state_dir: Where state lives unless one of the three says otherwise.
        file_name: For error texts.

    Raises:
        ConfigError: An unknown name, a value of the wrong form, or two settings that exclude each other.
    """
    given: dict[str, tuple[str, str, Any]] = {}  # name -> (origin, where for error texts, raw value)
    for key, raw in _toml_table(toml_text, file_name).items():
        _known(key, ROWS, f"{file_name}: unknown setting")
        given[key] = ("file", f"'{key}' in {file_name}", raw)
    variables = {row.variable: row.name for row in TABLE}
    for variable, text in environ.items():
        if variable.startswith(ENV_PREFIX) and variable not in (CONFIG_VARIABLE, *TEST_VARIABLES):
            _known(variable, variables, "unknown environment variable")
            given[variables[variable]] = ("environment", variable, text)
    for name, value in flags.items():
        if value is not None and value != ():
            given[name] = ("flag", ROWS[name].option, value)

    values = {name: _parsed(ROWS[name], where, raw) for name, (_, where, raw) in given.items()}
    settings = Settings(**({"state_dir": state_dir} | values))
    _check_combinations(settings)
    origin = {row.name: given[row.name][0] if row.name in given else "default" for row in TABLE}
    return Loaded(settings, origin)


def read_settings(
    flags: Mapping[str, Any], environ: Mapping[str, str] = os.environ, config: Path | None = None
) -> Loaded:
    """``load_settings`` of the real file and environment.

    Args:
        flags: As for ``load_settings``.
        environ: As for ``load_settings``; ``EDGEMESH_CONFIG`` names the file.
        config: ``--config``. A file that was named must exist; the default one need not.

    Raises:
        ConfigError: As ``load_settings``, or the file cannot be read.
    """
    named = config or (Path(environ[CONFIG_VARIABLE]).expanduser() if environ.get(CONFIG_VARIABLE) else None)
    path = named or default_config_file()
    try:
        with path.open("rb") as file:
            raw = file.read(CONFIG_BYTES_MAX + 1)
        if len(raw) > CONFIG_BYTES_MAX:
            raise ConfigError(f"{path} is larger than 1 MiB: is it the right file?")
        text: str | None = raw.decode()
    except FileNotFoundError as error:
        if named is not None:
            raise ConfigError(f"no file at {path}: correct --config or {CONFIG_VARIABLE}") from error
        text = None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return load_settings(flags, environ, text, state_dir=default_state_dir(), file_name=str(path))


def _toml_table(text: str | None, file_name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text or "")
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file_name} is not TOML: {error}") from error


def _known(name: str, names: Mapping[str, object], complaint: str) -> None:
    if name in names:
        return
    near = difflib.get_close_matches(name, list(names), n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(sorted(names))}"
    raise ConfigError(f"{complaint} '{name}'; {hint}")


def _parsed(row: Setting, where: str, raw: Any) -> Any:
    try:
        return row.parse(raw)
    except ValueError as error:
        raise ConfigError(f"{where} {error}") from error


def _check_combinations(settings: Settings) -> None:
    if settings.new and settings.code is not None:
        raise ConfigError("--new makes a new join code, --code uses one: give only one of the two")
    if not settings.plain and settings.plain_port:
        raise ConfigError("--no-plain turns off the listener of --plain-port: give only one of the two")
    if settings.slowdown > 1 and not settings.compute:
        raise ConfigError("--slowdown slows what --no-compute leaves out: give only one of the two")
    if settings.hold == "top" and not settings.compute:
        raise ConfigError(
            "--hold top says what to load, --no-compute loads nothing: give only one of the two"
        )
    if settings.port and settings.port == settings.plain_port:
        raise ConfigError(f"--port and --plain-port are both {settings.port}: they are two listeners")
