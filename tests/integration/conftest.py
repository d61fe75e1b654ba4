"""Fixtures of the broker tests: each kind that is installed, and a running one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.broker import start_broker
from mesh.brokers.contract import (
    BrokerKind,
    RunningBroker,
)
from tests.integration.broker_clients import (
    KINDS,
    settings,
)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> BrokerKind:
    kind: BrokerKind = request.param
    return kind


@pytest.fixture
async def broker(kind: BrokerKind, tmp_path: Path) -> AsyncIterator[RunningBroker]:
    running = await start_broker(settings(kind, tmp_path))
    yield running
    await running.stop()
