"""A VM's own TPM: real swtpm, real QEMU, and a guest that uses its TPM before, during and after its moves."""

import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.host.models import VtpmView
from sealane.testing.machine import Hardware, Workload
from sealane.testing.pair import AgentHost, Guest, HostPair, make_pair

pytestmark = pytest.mark.e2e

SECRET = "a word that only this TPM knows"
_LINE = re.compile(r"tpm (\d+) ek=(\w+) key=(\w+) counter=(\d+) secret=(\w+)")


class TpmGuest:
    """The guest, and what it says of its TPM."""

    def __init__(self, pair: HostPair) -> None:
        self.pair, self.home, self.away = pair, pair.a, pair.b
        workload = Workload(fill_mib=2, tpm_secret=SECRET)
        self.guest: Guest = pair.add_guest(vtpm=True, workload=workload, hardware=Hardware(memory_mib=128))

    def start(self) -> None:
        with self.home.client() as client:
            client.start_vtpm(self.guest.name)
        self.pair.start_guest(self.guest, self.home, warm=False)
        self.wait_uses(2)

    def uses(self) -> list[tuple[str, ...]]:
        return _LINE.findall(self.guest.console.text)

    def wait_uses(self, count: int) -> None:
        wanted, deadline = len(self.uses()) + count, time.monotonic() + 30.0
        while len(self.uses()) < wanted:
            assert "TPM FAILED" not in self.guest.console.text, self.guest.console.lines[-5:]
            assert time.monotonic() < deadline, self.guest.console.lines[-5:]
            time.sleep(0.05)

    def assert_whole(self) -> None:
        """The TPM is the one that it was: nothing changed, the counter missed nothing, the session was always good."""
        self.wait_uses(3)
        uses = self.uses()
        assert "TPM FAILED" not in self.guest.console.text
        assert len({(ek, key) for _, ek, key, _, _ in uses}) == 1
        assert {secret for *_, secret in uses} == {"right"}
        for before, after in itertools.pairwise(uses):
            assert (int(after[0]), int(after[3])) == (int(before[0]) + 1, int(before[3]) + 1)

    def exchange(self) -> None:
        self.home, self.away = self.away, self.home

    def view(self, end: AgentHost) -> VtpmView:
        with end.client() as client:
            return client.vtpm(self.guest.name)

    def files(self, end: AgentHost) -> list[Path]:
        """Everything that lies where this host keeps the TPM, its keys among it."""
        places = (end.host.scratch / "vtpm", end.host.paths.state / "vtpm")
        return [path for place in places for path in place.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def vm() -> Iterator[TpmGuest]:
    with make_pair() as pair:
        made = TpmGuest(pair)
        made.start()
        yield made
        made.assert_whole()


def test_it_goes_and_comes_back_with_all_that_was_in_it(vm: TpmGuest) -> None:
    for _ in range(2):
        before = vm.view(vm.home)
        moved = vm.pair.migrate(vm.guest, vm.home, vm.away)
        assert (moved.state, moved.problem) == ("completed", None)
        arrived = vm.pair.await_end(vm.away, moved.id)
        vm.assert_whole()
        left, here = vm.view(vm.home), vm.view(vm.away)
        assert (left.status, left.running) == ("gone", False)
        assert (here.status, here.in_use, here.migrating) == ("here", True, False)
        assert before.facts
        assert here.facts
        assert arrived.vtpm
        assert here.facts.ek_sha256 == before.facts.ek_sha256 != ""
        assert here.facts.version >= arrived.vtpm.version > before.facts.version
        assert here.epoch == before.epoch + 1
        # nothing usable stays: no key, no state
        assert {path.suffix for path in vm.files(vm.home)} == {".json", ".lock"}
        with vm.home.client() as client, pytest.raises(SealaneError) as refused:
            client.start_vtpm(vm.guest.name)
        assert refused.value.code == "vtpm.gone"
        vm.exchange()


def test_a_rotation_changes_the_key_under_a_running_vm(vm: TpmGuest) -> None:
    before = vm.view(vm.home)
    keys = {path.name for path in vm.files(vm.home) if path.suffix == ".key"}
    with vm.home.client() as client:
        client.change_vtpm(vm.guest.name, "verify")
        after = client.change_vtpm(vm.guest.name, "rotate")
        client.change_vtpm(vm.guest.name, "verify")
    vm.assert_whole()
    assert before.facts
    assert after.facts
    assert after.facts.counter == before.facts.counter + 1
    assert keys
    assert not keys & {path.name for path in vm.files(vm.home)}
    assert after.in_use
