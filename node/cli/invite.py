"""Let others in: ``token`` for devices, ``mqtt`` for people and scripts that speak MQTT."""

from __future__ import annotations

import asyncio
import json
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from mesh.ids import MeshName
from node.cli.options import REACH, as_json, choose, settings_flags

if TYPE_CHECKING:
    from mesh.transport.identity import Identity
    from node.state import KnownBroker

__all__ = ["COMMANDS", "ShellLines", "shell_lines"]


@click.command()
@as_json
@settings_flags("mesh", "state_dir")
def token(is_json: bool, **flags: Any) -> None:
    """Print the join code, for other devices."""
    from node.joining import known_key

    chosen = choose(flags)
    key = known_key(chosen.settings, chosen.state)
    if is_json:
        click.echo(json.dumps({"mesh": key.name, "code": key.code, "fingerprint": key.fingerprint}))
        return
    click.echo(key.code)
    click.echo(
        f"This is the code of mesh '{key.name}' (fingerprint {key.fingerprint}). On the other device:\n\n"
        "    edgemesh join --code CODE\n\n"
        "Whoever has this code is a member: share it like a password.",
        err=True,
    )


@dataclass(frozen=True, slots=True)
class ShellLines:
    """Ready to paste, one shell line each."""

    subscribe: str
    publish: str


PROMPT = json.dumps({"prompt": "What is a mesh?", "max_tokens": 60})


def shell_lines(mesh: MeshName, connection: list[str]) -> ShellLines:
    """``mosquitto_sub`` and ``mosquitto_pub`` for the task topics, with these connection arguments."""
    from mesh.topics import PROGRESS, RESULT, STATUS, STREAM, SUBMIT

    topics = [part for row in (STATUS, STREAM, PROGRESS, RESULT) for part in ("-t", row.filter(mesh))]
    return ShellLines(
        shlex.join(["mosquitto_sub", *connection, "-v", *topics]),
        shlex.join(["mosquitto_pub", *connection, "-q", "1", "-t", SUBMIT.topic(mesh), "-m", PROMPT]),
    )


def _files(identity: Identity) -> dict[str, str]:
    """By the names of mosquitto_pub's options."""
    paths = {"cafile": identity.ca_path, "cert": identity.cert_path, "key": identity.key_path}
    return {name: str(path) for name, path in paths.items()}


def _tls_arguments(broker: KnownBroker, identity: Identity, *, is_here: bool) -> list[str]:
    address = "localhost" if is_here else broker.ref.addresses[0]
    files = [
        "--cafile",
        str(identity.ca_path),
        "--cert",
        str(identity.cert_path),
        "--key",
        str(identity.key_path),
    ]
    # Certificates name nodes, not addresses (those change). --insecure skips only the comparison of the
    # address with the name; the chain up to the mesh's own authority is still checked.
    return ["-h", address, "-p", str(broker.ref.port), *files, *([] if is_here else ["--insecure"])]


@click.command()
@click.option("--name", default="shell", show_default=True, help="Name of the certificate's files.")
@as_json
@settings_flags(*REACH)
def mqtt(name: str, is_json: bool, **flags: Any) -> None:
    """Print mosquitto_pub and mosquitto_sub lines that work here.

    Issues the client certificate they use.
    """
    from node.client import find_broker
    from node.joining import known_key

    chosen = choose(flags)
    mesh = chosen.settings.mesh
    broker = asyncio.run(find_broker(chosen.settings, chosen.state))
    record: dict[str, Any] = {"mesh": mesh, "host": broker.ref.addresses[0], "port": broker.ref.port}
    ways: list[tuple[str, str, ShellLines]] = []
    user = ["-u", broker.ref.username] if broker.ref.username else []  # the password is for the reader to add
    is_here = broker.ref.host in chosen.state.nodes_here(mesh)
    if broker.ref.tls:
        identity = chosen.state.client_identity(
            known_key(chosen.settings, chosen.state), name, is_member=False
        )
        record |= _files(identity)
        note = (
            f"TLS, as client '{name}' (copy its files to use them elsewhere: they let in, and are no member)"
        )
        arguments = [*_tls_arguments(broker, identity, is_here=is_here), *user]
        ways.append(("tls", note, shell_lines(mesh, arguments)))
    else:
        arguments = ["-h", broker.ref.addresses[0], "-p", str(broker.ref.port), *user]
        ways.append(("site", "the site's own broker, unencrypted", shell_lines(mesh, arguments)))
    if is_here and broker.plain_port is not None:
        record["plain_port"] = broker.plain_port
        lines = shell_lines(mesh, ["-h", "127.0.0.1", "-p", str(broker.plain_port)])
        ways.append(("plain", "unencrypted, on this machine only", lines))
    if is_json:
        record |= {way: {"subscribe": lines.subscribe, "publish": lines.publish} for way, _, lines in ways}
        click.echo(json.dumps(record))
        return
    for _, note, lines in ways:
        click.echo(f"# {note}: listen, then ask from another terminal\n{lines.subscribe}\n{lines.publish}\n")


COMMANDS = (token, mqtt)
