"""A node on this device: ``join``, ``drain``, ``leave``."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import click

from mesh.errors import ConfigError
from mesh.ids import NodeId
from node.cli.options import REACH, Chosen, choose, end_with, settings_flags
from node.signals import end_at_once

if TYPE_CHECKING:
    from node.joining import JoinKey

__all__ = ["COMMANDS"]

ALL = (
    "mesh", "code", "new", "name", "seeds", "broker", "broker_kind", "interfaces", "port",
    "plain", "plain_port", "compute", "model", "precision", "hold", "top_layers", "threads",
    "adapter_memory", "adapter_disk", "adapter_replicas", "feature_memory", "feature_disk",
    "slowdown", "policy", "headless", "log_format", "log_level", "state_dir",
)  # fmt: skip


@click.command()
@settings_flags(*ALL)
def join(**flags: Any) -> None:
    """Run a node in the foreground; the first one creates the mesh."""
    end_at_once()
    from node.compute.models import resolve

    chosen = choose(flags)
    if chosen.settings.compute and chosen.settings.model is not None:
        resolve(chosen.settings.model)  # a misspelt model must not become a node that never computes
    end_with(asyncio.run(_join(chosen)))


async def _join(chosen: Chosen) -> int:
    from node.agent import serve  # deferred: no other command may pay for it
    from node.joining import settle_key

    joined = await settle_key(chosen.settings, chosen.state)
    _welcome(joined, chosen)
    return await serve(chosen.settings)


def _welcome(joined: JoinKey, chosen: Chosen) -> None:
    """A new mesh's code, once, and what to do with it. JSON logs are for machines: no talk in between."""
    key = joined.key
    if chosen.settings.log_format == "json":
        return
    if joined.origin == "created":
        click.echo(
            f"New mesh '{key.name}' (fingerprint {key.fingerprint}). To join with another device, run there:"
            f"\n\n    edgemesh join --code {key.code}\n\n"
            "Whoever has this code is a member: share it like a password. `edgemesh token` shows it again.",
            err=True,
        )
    elif chosen.settings.new:
        click.echo(
            f"edgemesh: mesh '{key.name}' (fingerprint {key.fingerprint}) exists on this machine: joining it",
            err=True,
        )


@click.command()
@click.argument("nodes", nargs=-1)
@click.option("--resume", is_flag=True, help="Take new work again.")
@settings_flags(*REACH)
def drain(nodes: tuple[str, ...], resume: bool, **flags: Any) -> None:
    """Let NODES finish what they run and take no new work.

    Without NODES: those that run on this device.
    """
    _tell(nodes, choose(flags), on=not resume, leave=False)


@click.command()
@click.argument("nodes", nargs=-1)
@settings_flags(*REACH)
def leave(nodes: tuple[str, ...], **flags: Any) -> None:
    """Drain NODES, then stop them.

    Without NODES: those that run on this device.
    """
    _tell(nodes, choose(flags), on=True, leave=True)


def _tell(nodes: tuple[str, ...], chosen: Chosen, *, on: bool, leave: bool) -> None:
    from node.client import drain_nodes

    wanted = [NodeId(node) for node in nodes] or chosen.state.nodes_here(chosen.settings.mesh)
    if not wanted:
        raise ConfigError(
            f"no node of mesh '{chosen.settings.mesh}' runs on this device: "
            "name one (`edgemesh nodes` lists them)"
        )
    for node, state in asyncio.run(drain_nodes(chosen.settings, chosen.state, wanted, on=on, leave=leave)):
        click.echo(f"{node}: {state}", err=True)


COMMANDS = (join, drain, leave)
