"""How an agent comes to life: one for each state and run directory, in the foreground, ended by signals."""

import asyncio
import fcntl
import io
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

from sealane.errors import make_error
from sealane.host.agent import Agent
from sealane.host.config import Settings
from sealane.host.logs import configure_logs
from sealane.host.quoting import check_expected
from sealane.paths import Paths


class _Locks(AbstractContextManager[None]):
    """One agent for each state directory and each run directory (flock(2): gone with the process)."""

    def __init__(self, paths: Paths) -> None:
        self._directories = (paths.state, paths.run)
        self._files: list[IO[str]] = []

    def __enter__(self) -> None:
        try:
            for directory in self._directories:
                self._lock(directory)
        except BlockingIOError:
            self.__exit__()
            raise make_error("agent.running", f"another agent holds {directory}") from None
        except OSError as error:
            self.__exit__()
            raise make_error("host.permission", f"{directory}: {error.strerror}") from error

    def _lock(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = open(directory / "agent.lock", "a", encoding="ascii")  # noqa: SIM115
        self._files.append(file)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __exit__(self, *_exc: object) -> None:
        for file in self._files:
            file.close()
        self._files.clear()


def run_agent(paths: Paths, settings: Settings) -> int:
    """Run this host's agent in the foreground until SIGTERM or SIGINT; the exit status is 0 after a graceful end.

    Raises `agent.running`, `host.identity-missing`, `host.port`, `host.permission`, `host.store`,
    `usage.configuration`, and `attest.*` for a file of expectations that cannot be used.
    """
    configure_logs(settings.log, settings.log_level)
    check_expected(paths, settings.attestation)
    with _Locks(paths):
        asyncio.run(_main(paths, settings))
    return 0


async def _main(paths: Paths, settings: Settings) -> None:
    agent = Agent(paths, settings)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    loop.add_signal_handler(signal.SIGUSR1, _dump_tasks, agent.log)
    await agent.run()


def _dump_tasks(log: Any) -> None:
    """Every task and where it stands, to the log."""
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        text = io.StringIO()
        task.print_stack(file=text)
        log.warning("task", name=task.get_name(), stack=text.getvalue())
