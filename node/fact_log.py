"""Facts of one node as log lines: what happened, in words, and in fields for machines."""

from __future__ import annotations

import logging

from coordinator.facts import (
    NODE_STOPS,
    AdaptersChanged,
    DrainChanged,
    EngineLost,
    EngineReady,
    RatesMeasured,
)
from mesh.core import Fact
from mesh.facts import Deposed, Elected, Followed, LinkDown, LinkUp, MemberChanged, StopBroker
from mesh.ids import NodeId
from node.logs import say

__all__ = ["log_fact"]


def log_fact(log: logging.Logger, fact: Fact, me: NodeId) -> None:
    """One line for a fact people care about; the rest only at debug level."""
    match fact:
        case LinkUp(broker_epoch=epoch, host=host):
            where = "its own server" if host is None else "this node" if host == me else host
            say(log, "link_up", f"connected to the broker on {where}", broker_epoch=epoch, host=host)
        case LinkDown(host_is_dead=True):
            say(log, "link_down", "lost the broker: its host refuses", host_is_dead=True)
        case LinkDown():
            say(log, "link_down", "lost the broker", host_is_dead=False)
        case StopBroker():
            say(log, "broker_stopping", "everybody moved to a better broker; stopping ours")
        case Elected(epoch=epoch):
            say(log, "elected", f"this node coordinates (epoch {epoch})", epoch=str(epoch), term=epoch.term)
        case Deposed(epoch=epoch):
            say(log, "deposed", f"epoch {epoch} is over for this node", epoch=str(epoch), term=epoch.term)
        case Followed(epoch=epoch):
            text = f"{epoch.node} coordinates (epoch {epoch})"
            say(log, "followed", text, epoch=str(epoch), coordinator=epoch.node, term=epoch.term)
        case MemberChanged(node=node, standing=standing, incarnation=incarnation) if node != me:
            text = f"{node} is {standing}"
            say(log, "member", text, member=node, standing=str(standing), incarnation=incarnation)
        case EngineReady(model=model, context_tokens=context_tokens, slots=slots):
            text = f"{model} is loaded: {slots} at once, up to {context_tokens} tokens"
            if fact.precision:
                text += f", in {fact.precision}" + (
                    f" ({fact.precision_reason})" if fact.precision_reason else ""
                )
            if fact.rates is not None and fact.rates.emulated_slowdown > 1:
                text += f"; plays a device {fact.rates.emulated_slowdown:g} times slower"
            say(log, "engine_ready", text, model=model, context_tokens=context_tokens, slots=slots,
                precision=fact.precision, adapters=len(fact.adapters))  # fmt: skip
        case RatesMeasured(rates=rates):
            reads, writes = rates.prefill_tokens_per_s, rates.decode_tokens_per_s
            text = f"this node reads {reads:.0f} and writes {writes:.0f} tokens/s"
            if rates.origin == "busy":
                text += ", beside other work on this machine: it measures again later"
            say(
                log,
                "rates",
                text,
                origin=rates.origin,
                prefill_tokens_per_s=reads,
                decode_tokens_per_s=writes,
            )
        case AdaptersChanged(names=names):
            say(log, "adapters", f"adapters here: {', '.join(names) or 'none'}", names=list(names))
        case EngineLost(reason=reason):
            level = logging.INFO if reason == NODE_STOPS else logging.WARNING
            say(log, "engine_lost", f"compute ended: {reason}", level, reason=reason)
        case DrainChanged(draining=True):
            say(log, "draining", "taking nothing new; finishing what runs")
        case DrainChanged():
            say(log, "resumed", "taking work again")
        case _:
            log.debug("%s", fact)
