"""An agent that can be interrupted at every step: `python -m sealane.testing.faultpoints DIRECTOR agent …`.

It is `sealane agent …`, with the few methods wrapped through which every transition, every journal write, every word to
the peer and every deed done to QEMU passes. The production code knows nothing of it (ADR 0022). Each time such a point
is reached the agent stands still, names the point on the unix socket DIRECTOR (`FaultDirector` of `campaign_rig.py`), and
goes on as the answer says:

    {"run": "/…", "point": "journal:handing-over:before", "enclaves": [4711]}   ->
                                                         <-   {"disk": "full", "clock_s": 0}

While it stands still the director may kill it, its enclaves, its QEMU, or cut the link. `disk` makes this journal write
fail as SQLite fails without space; `clock_s` is how far the wall clock is off from now on.

    journal:STATE:before|after    an entry of the journal that says this state (":launched" with the process launched)
    step:STATE:INPUT              the hand-over's table was followed
    say:KIND:before|after         a message given to the enclave
    hear:KIND                     a message from the peer
    qemu:COMMAND:before|after     a command to QEMU; qemu:destroy is the end of a launched process
"""

import contextlib
import functools
import json
import os
import socket
import sqlite3
import sys
import time
import weakref
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from types import ModuleType
from typing import Any, Final

from sealane.enclave.interface import Ecall, SendMessage
from sealane.host import store
from sealane.host.migration import messages
from sealane.host.migration.enclave_process import Closeable, EnclaveProcess
from sealane.host.models import Migration
from sealane.host.store import Store
from sealane.hypervisor import launch
from sealane.hypervisor.qmp import QmpMachine
from sealane.paths import RUN_VARIABLE
from sealane.session.handover import Handover, Input, State

QEMU_COMMANDS: Final = (
    "migrate",
    "migrate_incoming",
    "migrate_continue",
    "start_postcopy",
    "pause_postcopy",
    "recover_incoming",
    "recover_outgoing",
    "cancel_migration",
    "resume",
    "quit",
)


class Points:
    """The agent's side of the conversation with the director."""

    def __init__(self, director: str) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(director)
        self._file = connection.makefile("rw")
        self._run = os.environ[RUN_VARIABLE]  # tells the director which host this is
        self._clock_s = 0.0
        self.enclaves: weakref.WeakSet[EnclaveProcess] = weakref.WeakSet()

    def reach(self, point: str) -> dict[str, Any]:
        """Stand still at `point`; gives the director's answer. Nothing else of this agent moves meanwhile."""
        pids = []
        for enclave in self.enclaves:
            with contextlib.suppress(AttributeError):  # not yet whole
                pids.append(enclave.pid)
        self._file.write(json.dumps({"run": self._run, "point": point, "enclaves": pids}) + "\n")
        self._file.flush()
        line = self._file.readline()
        if not line:
            os._exit(9)  # the campaign is over
        answer: dict[str, Any] = json.loads(line)
        self._clock_s = float(answer.get("clock_s", 0.0))
        return answer

    @property
    def clock_s(self) -> float:
        """How far this agent's wall clock is off."""
        return self._clock_s


class FullDisk:
    """A database connection whose commits fail as on a disk without space."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)

    def execute(self, statement: str, *values: Any) -> Any:
        """As the connection does, but for COMMIT."""
        if statement == "COMMIT":
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode, error.sqlite_errorname = sqlite3.SQLITE_FULL, "SQLITE_FULL"
            raise error
        return self._db.execute(statement, *values)


def wrap_everything(points: Points) -> None:
    """Put the points in, once every module of the agent has been imported."""
    _wrap_journal(points)
    _wrap_steps(points)
    _wrap_messages(points)
    _wrap_qemu(points)
    _wrap_clock(points)


def _wrap_journal(points: Points) -> None:
    write = Store.journal

    def journal(self: Store, migration: Migration, **keywords: Any) -> None:
        what = f"journal:{migration.state}" + (":launched" if keywords.get("launched") else "")
        answer = points.reach(f"{what}:before")
        kept = self._db
        if answer.get("disk") == "full":
            self._db = FullDisk(kept)  # type: ignore[assignment]
        try:
            write(self, migration, **keywords)
        finally:
            self._db = kept
        points.reach(f"{what}:after")

    Store.journal = journal  # type: ignore[method-assign]


def _wrap_steps(points: Points) -> None:
    move = Handover.step

    def step(self: Handover, happened: Input) -> State:
        before = self.state
        after = move(self, happened)
        points.reach(f"step:{before}:{happened}")
        return after

    Handover.step = step  # type: ignore[method-assign]


def _wrap_messages(points: Points) -> None:
    begin, give, parse = EnclaveProcess.__init__, EnclaveProcess.call, messages.parse_message

    def __init__(self: EnclaveProcess, *arguments: Any, **keywords: Any) -> None:
        begin(self, *arguments, **keywords)
        points.enclaves.add(self)

    def say(self: EnclaveProcess, call: Ecall, *sockets: Closeable) -> None:
        if not isinstance(call, SendMessage):
            give(self, call, *sockets)
            return
        kind = json.loads(call.payload)["kind"]
        points.reach(f"say:{kind}:before")
        give(self, call, *sockets)
        points.reach(f"say:{kind}:after")

    def hear(payload: str) -> messages.Message:
        message = parse(payload)
        points.reach(f"hear:{message.kind}")
        return message

    EnclaveProcess.__init__ = __init__  # type: ignore[method-assign]
    EnclaveProcess.call = say  # type: ignore[method-assign]
    messages.parse_message = hear


def _wrap_qemu(points: Points) -> None:
    for name in QEMU_COMMANDS:
        setattr(QmpMachine, name, _stopping(points, name, getattr(QmpMachine, name)))
    destroy = launch.destroy
    wrapped = _stopping(points, "destroy", destroy)
    for module in _ours():
        if getattr(module, "destroy", None) is destroy:
            vars(module)["destroy"] = wrapped


def _stopping(points: Points, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(work)
    async def wrapped(*arguments: Any, **keywords: Any) -> Any:
        points.reach(f"qemu:{name}:before")
        result = await work(*arguments, **keywords)
        points.reach(f"qemu:{name}:after")
        return result

    return wrapped


def _wrap_clock(points: Points) -> None:
    """The wall clock only: the monotonic one does not jump (clock_gettime(2))."""
    true_time = time.time

    class JumpingDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=points.clock_s)

    vars(store)["datetime"] = JumpingDatetime
    time.time = lambda: true_time() + points.clock_s


def _ours() -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if name.startswith("sealane.") and module is not None]


def main() -> None:
    """Be `sealane`, with the points in it."""
    director = sys.argv.pop(1)
    import sealane.host.agent  # noqa: F401, PLC0415 - so that every module is there to be wrapped
    from sealane.cli import main as sealane_main  # noqa: PLC0415

    wrap_everything(Points(director))
    sealane_main()


if __name__ == "__main__":
    main()
