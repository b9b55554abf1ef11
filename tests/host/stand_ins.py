"""Stand-ins for the migration and the peers' listener, driven by the test."""

import asyncio
from collections.abc import Callable
from typing import Any

from sealane.host.agent import Agent
from sealane.host.job import Job
from sealane.host.models import Migration, MigrationRequest, Peer, VmDefinition


class StandInJob(Job):
    """Does what the test puts into `steps`: changes to apply, or an error to raise; None ends `run`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: asyncio.Queue[Callable[[], object] | Exception | None] = asyncio.Queue()

    async def run(self) -> None:
        while (step := await self.steps.get()) is not None:
            if isinstance(step, Exception):
                raise step
            step()


class StandInListener:
    """A listener that opens nothing."""

    address = "[::1]:48217"

    def __init__(self, _agent: Agent) -> None:
        self.started = False

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.started = False


def make_source(
    agent: Agent, _request: MigrationRequest, _vm: VmDefinition, _peer: Peer, migration: Migration
) -> StandInJob:
    return StandInJob(agent.store, migration)
