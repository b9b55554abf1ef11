"""What an agent that died has not done with a TPM, the next one does from the journal; and nothing else."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sealane.errors import make_error
from sealane.host.config import Settings
from sealane.host.models import Migration, VmDefinition, VtpmFacts
from sealane.host.store import Store, utc_now
from sealane.host.vtpm import Vtpms
from sealane.paths import Paths
from sealane.vtpm.record import Record, Records
from tests.vtpm.rig import JOURNEY, TYPES, EnclaveStandIn, KeeperProcess, QemuStandIn

ID = "0" * 31


class Host:
    """One host's vTPMs with its journal; no agent."""

    def __init__(self, root: Path) -> None:
        self.paths = Paths(root / "state", root / "run", root / "etc")
        self.store = Store(self.paths.database)
        self.vm: VmDefinition | None = VmDefinition(name="web01", qmp="/q", vtpm=str(root / "files"))
        self.vtpms = Vtpms(self.paths, Settings(), self.store, self._find)
        self.keeper = KeeperProcess(root)
        self.keeper.order = self.vtpms._order(self.definition, "open", 0)

    @property
    def definition(self) -> VmDefinition:
        return self._find("web01")

    def _find(self, name: str) -> VmDefinition:
        if self.vm is None:
            raise make_error("vm.unknown", name)
        return self.vm

    def journal(self, number: int, *, epoch: int | None = None, **facts: Any) -> None:
        now = utc_now() + timedelta(seconds=number)
        ended = now if facts["state"] in {"completed", "aborted"} else None
        self.store.journal(
            Migration(
                id=f"{ID}{number}", number=number, vm="web01", peer="b", started_at=now, ended_at=ended, epoch=epoch,
                runs_at="source", **facts,
            ),
            epoch=epoch,
        )  # fmt: skip

    def record(self) -> Record:
        found = Records(self.paths.state / "vtpm").find("web01")
        assert found is not None
        return found

    def settle(self) -> str:
        asyncio.run(self.vtpms.settle_all())
        return self.record().status

    def create(self) -> None:
        self.keeper.start("create").end()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    made.keeper.end()
    made.store.close()


def test_a_tpm_whose_vm_left_is_destroyed(host: Host) -> None:
    host.create()
    host.journal(1, role="source", state="handing-over", epoch=1)
    assert host.settle() == "here"
    host.journal(1, role="source", state="in-doubt", epoch=1)
    assert host.settle() == "here"
    directory = host.record().path
    host.journal(1, role="source", state="completed", epoch=1)
    assert host.settle() == "gone"
    assert not directory.exists()
    assert not list(Path(host.keeper.order.records).glob("*.key"))


def test_what_was_tried_later_does_not_hide_that_it_left(host: Host) -> None:
    host.create()
    host.journal(1, role="source", state="completed", epoch=1)
    host.journal(2, role="source", state="aborted")
    assert host.settle() == "gone"


def test_one_whose_vm_stayed_is_not(host: Host) -> None:
    host.create()
    host.journal(1, role="source", state="aborted", epoch=1)  # a ticket that was refused
    assert host.settle() == "here"
    host.vtpms._alone(host.definition, lambda vault: vault.verify())


def test_one_that_was_given_up_and_stayed_is_of_the_vms_epoch(host: Host) -> None:
    host.keeper.start("create")
    for state in ("handing-over", "in-doubt"):
        host.journal(1, role="source", state=state, epoch=1)
        assert (host.settle(), host.record().epoch) == ("here", 0)
    host.journal(1, role="source", state="aborted", epoch=1)  # as `resolve --own-here` ends a doubt
    assert (host.settle(), host.record().epoch) == ("here", 1)
    host.journal(2, role="source", state="completed", epoch=2)
    assert host.settle() == "gone"


def test_while_another_migration_is_under_way_the_epoch_stays(host: Host) -> None:
    host.keeper.start("create")
    host.journal(1, role="source", state="aborted", epoch=1)
    host.journal(2, role="source", state="handing-over", epoch=2)
    assert (host.settle(), host.record().epoch) == ("here", 0)


def test_an_old_departure_does_not_end_a_tpm_that_came_later(host: Host) -> None:
    host.journal(1, role="source", state="completed", epoch=3)
    host.keeper.order = host.vtpms._order(host.definition, "open", 4)
    host.create()
    assert host.settle() == "here"


def receive(host: Host, number: int, facts: VtpmFacts) -> None:
    async def run() -> None:
        listener = await host.vtpms.expect(host.definition, facts)
        assert listener is not None
        await host.vtpms.receive(host.definition, f"{ID}{number}", 0, facts, listener)

    asyncio.run(run())


def brought(host: Host, tmp_path: Path) -> QemuStandIn:
    """A TPM that has come whole with migration 1."""
    source = KeeperProcess(tmp_path / "source")
    (tmp_path / "source").mkdir()
    source.start("create")
    sender = QemuStandIn(source)
    assert sender.init() == 0
    enclave = EnclaveStandIn(source, JOURNEY, is_source=True)
    blobs = {each: sender.get(each)[1] for each in TYPES}
    enclave.close()
    sender.close()
    source.end()
    facts = VtpmFacts(ek_sha256="", version=1, counter=1)
    receive(host, 1, facts)
    qemu = QemuStandIn(host.keeper)
    enclave = EnclaveStandIn(host.keeper, JOURNEY, is_source=False)
    assert [qemu.set(each, blobs[each]) for each in TYPES] == [0, 0, 0]
    assert qemu.init(incoming=True) == 0
    asyncio.run(host.vtpms.loaded(host.definition))  # without which no ticket is taken
    enclave.close()
    return qemu


@pytest.mark.parametrize("keeper_lives", [True, False])
def test_one_that_came_with_a_vm_that_is_here_is_kept(host: Host, tmp_path: Path, keeper_lives: bool) -> None:
    qemu = brought(host, tmp_path)
    host.journal(1, role="destination", state="handing-over", epoch=1)
    assert host.settle() == "incoming"
    host.journal(1, role="destination", state="completed", epoch=1)
    if not keeper_lives:
        qemu.close()
        host.keeper.end()
    assert host.settle() == "here"
    assert host.record().epoch == 1
    qemu.close()
    host.keeper.end()
    host.vtpms._alone(host.definition, lambda vault: vault.verify())


def test_one_that_came_with_a_vm_that_did_not_is_destroyed(host: Host, tmp_path: Path) -> None:
    qemu = brought(host, tmp_path)
    directory = host.record().path
    host.journal(1, role="destination", state="aborted")
    assert host.settle() == "gone"
    assert not directory.exists()
    qemu.close()


def test_what_came_to_nothing_is_cleared_away_by_the_next(host: Host, tmp_path: Path) -> None:
    brought(host, tmp_path).close()
    host.keeper.end()
    before = host.record().path
    facts = VtpmFacts(ek_sha256="", version=1, counter=1)
    receive(host, 2, facts)
    assert not before.exists()
    assert host.record().migration == f"{ID}2"


def test_a_vm_that_was_forgotten_is_passed_over(host: Host) -> None:
    host.create()
    host.journal(1, role="source", state="completed", epoch=1)
    host.vm = None
    assert host.settle() == "here"


def test_a_directory_cannot_say_more_to_swtpm_than_where_it_is() -> None:
    with pytest.raises(ValidationError):
        VmDefinition(name="web01", qmp="/q", vtpm="/files,mode=0666")
