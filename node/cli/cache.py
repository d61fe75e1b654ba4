"""The mesh as one memory: ``edgemesh cache``, ``cache clear`` and ``cache verify``."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mesh.errors import ConfigError, TaskError
from mesh.units import bytes_text, seconds_text
from node.cli.options import REACH, Chosen, as_json, choose, settings_flags

if TYPE_CHECKING:
    from mesh.messages.cache import CacheTier
    from node.cache.asking import CacheRow, CacheView
    from node.cache.verify import Verified

__all__ = ["COMMANDS"]

_SAY_EVERY_BYTES = 64 << 20


@click.group(invoke_without_command=True)
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C; with --json one line a second.")
@as_json
@settings_flags(*REACH)
@click.pass_context
def cache(context: click.Context, /, is_json: bool, watch: bool, **flags: Any) -> None:
    """Show who shares the mesh's memory, what lies there, and what that has spared.

    SHARE is a node's part of all blocks. MEMORY, DISK and PEERS are where the blocks a node needed were
    found since it started, the nearest first; it computed the rest.
    """
    if context.invoked_subcommand is not None:
        return
    from node.cache.asking import cache_snapshot

    chosen = choose(flags)
    if watch:
        asyncio.run(_watch(chosen, is_json))
    else:
        _put(asyncio.run(cache_snapshot(chosen.settings, chosen.state)), is_json)


async def _watch(chosen: Chosen, is_json: bool) -> None:
    from node.cache.asking import cache_watch

    is_screen = sys.stdout.isatty() and not is_json
    async with aclosing(cache_watch(chosen.settings, chosen.state)) as views:
        async for view in views:
            if is_screen:
                click.clear()
            _put(view, is_json)


def _put(view: CacheView, is_json: bool) -> None:
    if is_json:
        click.echo(json.dumps(_plain(view)))
        return
    from node.faces.console import table_out

    if view.epoch is None:
        click.echo("no ring: no node that is here gives anything (--feature-disk), or none coordinates yet")
    else:
        n_bytes = sum(row.report.quota_bytes for row in view.rows if row.report and row.share)
        givers = sum(row.share > 0 for row in view.rows)
        copies = "every block lies twice" if view.replicas > 1 else "every block lies once: nobody else gives"
        nodes = f"{givers} node{'s' if givers != 1 else ''} give{'s' if givers == 1 else ''}"
        click.echo(f"ring {view.epoch}: {nodes} {bytes_text(n_bytes)}, {copies}\n")
    table_out(
        ("node", "share", "holds", "quota", "blocks", "memory", "disk", "peers", "computed", "saved"),
        [_cells(row) for row in view.rows],
    )
    asked = sum(row.n_asked for row in view.rows)
    if asked:
        found = asked - sum(row.report.misses for row in view.rows if row.report)
        saved = seconds_text(sum(row.saved_s for row in view.rows))
        click.echo(f"\n{found / asked:.0%} of {asked:,} blocks were found; {saved} of computing saved")


def _cells(row: CacheRow) -> tuple[str, ...]:
    report = row.report
    share = f"{row.share:.1%}" if row.share else "reads only"
    name = str(row.node) if row.state in ("online", "draining") else f"{row.node} ({row.state})"
    if report is None:
        return (name, share, *("–",) * 8)

    def part(n_blocks: int) -> str:
        return f"{n_blocks / row.n_asked:.0%}" if row.n_asked else "–"

    def tier(one: CacheTier) -> str:
        return part(one.hits)

    return (
        name, share, bytes_text(report.held_bytes), bytes_text(report.quota_bytes), f"{report.blocks:,}",
        tier(report.memory), tier(report.disk), tier(report.peers), part(report.misses),
        seconds_text(row.saved_s) if row.saved_s else "–",
    )  # fmt: skip


def _plain(view: CacheView) -> dict[str, Any]:
    rows = []
    for row in view.rows:
        report = asdict(row.report) if row.report else None
        if report is not None:
            report.pop("node")
        rows.append(
            {"node": row.node, "state": row.state, "share": round(row.share, 4), "asked": row.n_asked,
             "saved_s": round(row.saved_s, 3), "report": report}
        )  # fmt: skip
    return {"epoch": view.epoch, "replicas": view.replicas, "nodes": rows}


# ── clear ───────────────────────────────────────────────────────────────────────────────────────────


@cache.command("clear")
@click.option("--everywhere", is_flag=True, help="On every node of the mesh, not on this machine alone.")
@as_json
@settings_flags(*REACH)
def clear_command(everywhere: bool, is_json: bool, **flags: Any) -> None:
    """Let go of what this machine's nodes hold, or all nodes with --everywhere.

    Nothing is lost but time: blocks that others hold come back, the rest is computed again when needed.
    """
    chosen = choose(flags)
    if everywhere:
        from node.cache.asking import clear_shares

        reports = asyncio.run(clear_shares(chosen.settings, chosen.state))
        if is_json:
            click.echo(json.dumps([{"node": one.node, "held_bytes": one.held_bytes} for one in reports]))
        else:
            click.echo(f"{len(reports)} node{'s' if len(reports) != 1 else ''} cleared")
        return
    from node.cache.verify import clear

    freed: dict[str, int] = {}
    for node, directory in chosen.state.shares_here(chosen.settings.mesh).items():
        try:
            freed[node] = clear(directory)
        except OSError as error:
            raise ConfigError(f"cannot clear {directory}: {error.strerror}") from error
    if is_json:
        click.echo(json.dumps([{"node": node, "freed_bytes": n_bytes} for node, n_bytes in freed.items()]))
    elif not freed:
        click.echo(f"no node of mesh '{chosen.settings.mesh}' has kept anything on this machine")
    for name, n_bytes in freed.items() if not is_json else ():
        click.echo(f"{name}: {bytes_text(n_bytes)} freed")


# ── verify ──────────────────────────────────────────────────────────────────────────────────────────


@cache.command("verify")
@click.option("--repair", is_flag=True, help="Remove what is damaged: it comes from others, or is computed.")
@as_json
@settings_flags("mesh", "state_dir")
def verify_command(repair: bool, is_json: bool, **flags: Any) -> None:
    """Read every block that this machine's nodes hold and compare it with its digest.

    Ends with code 1 if something is damaged and stays so. Readers check what they read in any case: damage
    costs time, never a wrong answer.
    """
    from node.cache.verify import verify

    chosen = choose(flags)
    shares = chosen.state.shares_here(chosen.settings.mesh)
    if not shares and not is_json:
        click.echo(f"no node of mesh '{chosen.settings.mesh}' has kept anything on this machine")
    rows, n_left = [], 0
    for node, directory in shares.items():
        try:
            found = verify(directory, _progress(str(node)) if sys.stderr.isatty() else lambda so_far: None)
        except OSError as error:
            raise ConfigError(f"cannot read {directory}: {error.strerror}") from error
        for damage in found.damaged if repair else ():
            damage.pack.unlink(missing_ok=True)
        n_left += 0 if repair else len(found.damaged)
        rows.append(
            {"node": node, "packs": found.n_packs, "blocks": found.n_blocks, "bytes": found.n_bytes,
             "damaged": [{"pack": str(one.pack), "why": one.reason, "bytes": one.n_bytes, "removed": repair}
                         for one in found.damaged]}
        )  # fmt: skip
        if not is_json:
            _say_verified(str(node), found, repair)
    if is_json:
        click.echo(json.dumps(rows))
    if n_left:
        raise TaskError(f"{n_left} damaged: `edgemesh cache verify --repair` removes them")


def _progress(node: str) -> Any:
    said = 0

    def told(so_far: Verified) -> None:
        nonlocal said
        if so_far.n_bytes - said >= _SAY_EVERY_BYTES:
            said = so_far.n_bytes
            click.echo(f"\r{node}: {bytes_text(so_far.n_bytes)} read", nl=False, err=True)

    return told


def _say_verified(node: str, found: Verified, is_repaired: bool) -> None:
    good = f"{found.n_blocks:,} blocks in {found.n_packs:,} packs, {bytes_text(found.n_bytes)}"
    click.echo(f"{node}: {good}{': all are as they were written' if not found.damaged else ''}")
    for damage in found.damaged:
        what = "removed" if is_repaired else "damaged"
        click.echo(f"  {what} {damage.pack.name}: {damage.reason}")


COMMANDS = (cache,)
