"""The command line under test: in this process through typer's runner, or as a process of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner, Result

import sealane
from sealane.cli import app
from tests.cli.stand_in import StandIn

Run = Callable[..., Result]
Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the machine's own state."""
    for name in ("state", "run", "config"):
        monkeypatch.setenv(f"SEALANE_{name.upper()}_DIR", str(tmp_path / name))
    for name in ("SEALANE_QEMU", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with StandIn() as stand_in:
        monkeypatch.setenv("SEALANE_RUN_DIR", str(stand_in.run))
        yield stand_in


@pytest.fixture
def run() -> Iterator[Run]:
    """In this process; an agent that is asked for sets logs up, towards a file that is closed with the answer."""

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, list(arguments), prog_name="sealane")

    root = logging.getLogger()
    kept = (root.handlers, root.level)
    yield invoke
    structlog.reset_defaults()
    root.handlers, root.level = kept


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(Path(sealane.__file__).parents[1]), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "sealane.cli", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
