"""A QMP client for tests: blocking, one command at a time, events kept until somebody asks.

Tests look at a machine from its second monitor, while the agent under test holds the first.
"""

import json
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sealane.testing.problems import RigError


def _connect(path: Path, timeout_s: float) -> socket.socket:
    """Connects; where the socket's file is there but nobody listens yet (QEMU binds first), tries again for a second."""
    deadline = time.monotonic() + 1.0
    while True:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout_s)
        try:
            connection.connect(str(path))
        except OSError as error:
            connection.close()
            if not isinstance(error, ConnectionRefusedError) or time.monotonic() > deadline:
                raise RigError(f"no QEMU answers on {path.name}: {error}") from error
            time.sleep(0.01)
        else:
            return connection


class Qmp:
    """One monitor connection. Answers and events are bounded by `timeout_s` each."""

    def __init__(self, path: Path, *, timeout_s: float = 20.0) -> None:
        self._timeout_s = timeout_s
        self._events: list[dict[str, Any]] = []
        self._socket = _connect(path, timeout_s)
        self._file = self._socket.makefile("rwb")
        try:
            self._read()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Qmp":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection."""
        with suppress(OSError):  # a command that QEMU did not take any more is still to be written
            self._file.close()
        self._socket.close()

    def interrupt(self) -> None:
        """Ends the connection for another thread that waits on it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _read(self) -> dict[str, Any]:
        try:
            line = self._file.readline()
        except OSError as error:
            raise RigError(f"QEMU did not answer: {error}") from error
        if not line:
            raise RigError("QEMU closed its monitor")
        message: dict[str, Any] = json.loads(line)
        return message

    def execute(self, command: str, /, **arguments: Any) -> Any:
        """Runs one command and gives what it returned. Underscores in argument names become dashes.

        Raises RigError with QEMU's own words where it refuses, and where it is gone.
        """
        renamed = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            self._file.write(json.dumps({"execute": command, "arguments": renamed}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise RigError(f"QEMU closed its monitor before {command}: {error}") from error
        while True:
            message = self._read()
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise RigError(f"QEMU refused {command}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_event(self, name: str) -> dict[str, Any]:
        """The next event of that name, among those that came already or within the timeout."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            for index, event in enumerate(self._events):
                if event["event"] == name:
                    return self._events.pop(index)
            if time.monotonic() > deadline:
                raise RigError(f"QEMU sent no event {name}")
            message = self._read()
            if "event" in message:
                self._events.append(message)

    def monitor(self, line: str) -> str:
        """The answer of the human monitor."""
        return str(self.execute("human-monitor-command", command_line=line))

    def allow_migration(self) -> None:
        """Lifts QEMU's limit on bandwidth (128 MiB/s unless told) and asks for migration events."""
        self.execute(
            "migrate-set-capabilities",
            capabilities=[{"capability": "events", "state": True}],
        )
        self.execute("migrate-set-parameters", max_bandwidth=100 << 30)

    def wait_migrated(self, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """Waits for the end of the outgoing migration and gives `query-migrate`'s answer; RigError where it failed."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            event = self.wait_event("MIGRATION")
            if event["data"]["status"] in {"completed", "failed", "cancelled"}:
                answer: dict[str, Any] = self.execute("query-migrate")
                if event["data"]["status"] != "completed":
                    raise RigError(f"the migration {event['data']['status']}: {answer.get('error-desc', 'no reason')}")
                return answer
        raise RigError(f"the migration took longer than {timeout_s:.0f} s")
