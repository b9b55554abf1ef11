"""A VM's own TPM on storage that both hosts share, and whatever is killed on its way: it works at one of the two, with all
that was in it. Real swtpms, real QEMU, agents that stand still at each of their steps (`sealane.testing.faultpoints`).
`./run test -m matrix` has more of the kills than CI."""

import fcntl
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from sealane.errors import SealaneError
from sealane.host.models import Migration, MigrationRequest
from sealane.testing.faultdirector import Attempt, Fault, FaultDirector, Injection, TpmFault
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost, make_pair
from tests.e2e.tpmguest import TpmGuest

pytestmark = pytest.mark.e2e

_END_TIMEOUT_S = 60.0
_TRIES = 3
_SECRET = "a word that only this TPM knows"


class SharedTpm(TpmGuest):
    """The guest; both hosts keep its TPM below one directory."""

    director: FaultDirector
    shared: Path

    def launches(self) -> list[Path]:
        """The directories of the launches that there are."""
        return sorted(path for path in self.shared.iterdir() if path.is_dir())

    def move(self, *injections: Injection) -> tuple[Migration, Migration]:
        """Try to, with these faults; how it ended at either end, once both know. A starved machine may need more than one try
        to come as far as the fault."""
        met: list[Any] = []
        for _ in range(_TRIES):
            with self.director.attempt(self.home, self.away, list(injections)) as attempt:
                with self.home.client() as client:
                    number = client.start_migration(MigrationRequest(vm=self.guest.name, host=self.away.name)).id
                home = self._await_end(self.home, number, attempt)
                if attempt.fired == list(injections):
                    away = self._await_end(self.away, number, attempt)
                    break
            met.append((home.problem, attempt.trace[-3:]))
        else:
            raise AssertionError(met)
        if home.state == "completed":
            self.guest.moved_to(self.away.name)
        return home, away

    def _await_end(self, end: AgentHost, number: str, attempt: Attempt) -> Migration:
        deadline = time.monotonic() + _END_TIMEOUT_S
        while True:
            for each in (self.home, self.away):
                if each.name in attempt.killed:
                    assert each.agent is not None
                    each.agent.process.wait()
                    attempt.killed.discard(each.name)
                    each.start_agent()
            with suppress(SealaneError), end.client() as client:
                found = client.migration(number)
                if found.ended_at is not None and found.state in {"completed", "aborted"}:
                    return found
            assert time.monotonic() < deadline, (end.name, attempt.trace)
            time.sleep(0.05)

    def await_status(self, end: AgentHost, status: str) -> None:
        """Until this host's record of the TPM says so: an agent that was killed settles it at its next start."""
        deadline = time.monotonic() + _END_TIMEOUT_S
        while (found := self.view(end).status) != status:
            assert time.monotonic() < deadline, (end.name, found)
            time.sleep(0.05)

    def assert_alone(self, end: AgentHost) -> None:
        """The TPM is at this host only: one launch's files, held by an swtpm; the other host has no key."""
        other = self.home if end is self.away else self.away
        self.await_status(end, "here")
        self.await_status(other, "gone")
        assert len(self.launches()) == 1
        assert is_locked(self.launches()[0])
        assert {path.suffix for path in (other.host.paths.state / "vtpm").iterdir()} == {".json", ".lock"}


def is_locked(launch: Path) -> bool:
    """Whether an swtpm holds the directory: 0.7.1 does from its start to its end, and refuses one that another holds."""
    with open(launch / ".lock", "r+b") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@pytest.fixture(scope="module")
def vm() -> Iterator[SharedTpm]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sl-", dir="/tmp")))
        director = stack.enter_context(FaultDirector(directory / "director.sock"))
        program = (sys.executable, "-m", "sealane.testing.faultpoints", str(director.path))
        pair = stack.enter_context(make_pair(program=program))
        director.ends = [pair.a, pair.b]
        workload = Workload(fill_mib=2, tpm_secret=_SECRET)
        made = SharedTpm(pair, pair.add_guest(vtpm=True, workload=workload, hardware=Hardware(memory_mib=128)))
        made.director, made.shared = director, directory / "shared"
        for end in (pair.a, pair.b):
            made.redefine(end, vtpm=str(made.shared))
        made.start()
        yield made


def test_both_hosts_may_keep_it_below_one_directory(vm: SharedTpm) -> None:
    """There, a cancel half-way, and back: each host's swtpm locks a directory of its own, so none waits for the other."""
    assert vm.move()[0].state == "completed"
    vm.exchange()
    vm.assert_alone(vm.home)

    before = vm.launches()[0]
    with vm.home.client() as client:
        request = MigrationRequest(vm=vm.guest.name, host=vm.away.name, max_bandwidth_bytes_per_s=1 << 22)
        last = client.start_migration(request)
        for event in client.events(last.id):
            last = event.migration
            if last.state == "copying" and last.progress.bytes_wire:
                assert len(vm.launches()) == 2
                assert is_locked(before)
                break
        client.cancel(last.id)
    assert vm.pair.await_end(vm.home, last.id).state == "aborted"
    vm.pair.await_end(vm.away, last.id)
    vm.assert_alone(vm.home)
    assert vm.launches() == [before]
    vm.assert_whole()

    assert vm.move()[0].state == "completed"
    vm.exchange()
    vm.assert_alone(vm.home)
    assert vm.launches() != [before]
    vm.assert_whole()


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("destination:qemu:migrate_incoming:after", "kill-keeper"),
        ("destination:qemu:migrate_incoming:after", "kill-swtpm"),
        ("destination:say:loaded:before", "kill-keeper"),
        ("destination:say:loaded:before", "kill-swtpm"),
        ("source:qemu:migrate_continue:before", "kill-enclave"),
        pytest.param("destination:qemu:migrate_incoming:after", "kill-agent", marks=pytest.mark.matrix),
    ],
)
def test_what_is_killed_before_the_ticket_leaves_it_at_the_source(
    vm: SharedTpm, point: str, fault: Fault | TpmFault
) -> None:
    """The source's own swtpm and keeper live in these, the guest goes on with its TPM, and nothing is left over there."""
    stayed, _ = vm.move(Injection(point, fault))
    assert stayed.state == "aborted"
    vm.assert_alone(vm.home)
    vm.assert_whole()


@pytest.mark.parametrize(
    ("point", "fault"),
    [
        ("destination:journal:handing-over:after", "kill-agent"),
        pytest.param("source:hear:receipt", "kill-agent", marks=pytest.mark.matrix),
    ],
)
def test_what_is_killed_after_the_ticket_leaves_it_at_the_destination(vm: SharedTpm, point: str, fault: Fault) -> None:
    left, came = vm.move(Injection(point, fault))
    assert left.state == came.state == "completed"
    vm.exchange()
    vm.assert_alone(vm.home)
    vm.assert_whole()


@pytest.mark.parametrize(
    ("point", "fault", "arrives"),
    [
        ("destination:journal:handing-over:before", "kill-keeper", True),
        pytest.param("source:qemu:migrate:after", "kill-swtpm", False, marks=pytest.mark.matrix),
    ],
)
def test_a_guest_whose_tpm_was_killed_finds_it_again_when_it_is_started_anew(
    vm: SharedTpm, point: str, fault: TpmFault, arrives: bool
) -> None:
    """It runs on without; nobody can give a running QEMU another swtpm. What the TPM had is not lost, and is nowhere else."""
    known = {use[1:3] for use in vm.uses()}
    counted = int(vm.uses()[-1][3])
    left, _ = vm.move(Injection(point, fault))
    assert left.state == ("completed" if arrives else "aborted")
    if arrives:
        vm.exchange()
    vm.await_status(vm.away, "gone")
    vm.await_status(vm.home, "here")
    with vm.guest.machines[vm.home.name].observe() as monitor:
        monitor.execute("quit")
    with vm.home.client() as client:
        # it may have been killed between a write and the note of it, which alone `after_crash` lets pass
        client.start_vtpm(vm.guest.name, after_crash=True)
    vm.pair.start_guest(vm.guest, vm.home, warm=False)
    vm.wait_uses(2)
    vm.assert_alone(vm.home)
    assert {use[1:3] for use in vm.uses()} == known
    assert int(vm.uses()[0][3]) >= counted
