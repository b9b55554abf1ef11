"""The agent's log: every line of a migration names it, whoever writes the line."""

import asyncio
import json
import logging
from pathlib import Path

import pytest
import structlog

from sealane.host.jobs import Jobs
from sealane.host.logs import configure_logs
from sealane.host.models import Migration
from sealane.host.store import Store
from tests.host.stand_ins import StandInJob

elsewhere = structlog.get_logger()


class TalkativeJob(StandInJob):
    """Its collaborators log through loggers of their own, from tasks of their own."""

    async def run(self) -> None:
        elsewhere.info("said by a module that knows no migration")
        async with asyncio.TaskGroup() as group:
            group.create_task(self._speak())
        raise ValueError("a bug")

    async def _speak(self) -> None:
        await asyncio.sleep(0)
        elsewhere.warning("said by another task")


async def test_every_line_of_a_migration_names_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    kept = (root.handlers, root.level)
    configure_logs("json", "debug")
    try:
        jobs = Jobs(Store(tmp_path / "db"))
        found: list[Migration] = []
        for vm in ("a", "b"):
            job = jobs.begin(lambda m: TalkativeJob(jobs._store, m), vm=vm, role="source", peer="b")
            found.append(job.migration)
        elsewhere.info("said by nobody's task")
        await jobs.stop(5.0)
    finally:
        structlog.reset_defaults()
        root.handlers, root.level = kept
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line.startswith("{")]
    for migration in found:
        own = [line["event"] for line in lines if line.get("migration") == migration.id[:8]]
        assert own == [
            "migration began",
            "said by a module that knows no migration",
            "said by another task",
            "unexpected error",
            "migration ended",
        ]
    assert [line["event"] for line in lines if "migration" not in line] == ["said by nobody's task"]
