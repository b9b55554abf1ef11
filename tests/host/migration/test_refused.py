"""A job takes its VM back from a QEMU that believes in postcopy once the refusal is journalled, and not before."""

from pathlib import Path

import pytest

from sealane.errors import make_error
from sealane.host.migration.refused import is_refused
from sealane.host.migration.taking_back import take_back
from sealane.host.problems import problem_of
from sealane.host.store import Store
from sealane.hypervisor.qmp import QmpMachine
from tests.host.factories import NOW, migration
from tests.host.stand_ins import StandInJob
from tests.hypervisor.machines import qemu_binaries
from tests.hypervisor.strands import unshared_switch

REFUSED = problem_of(make_error("handover.refused", "it never ran"))
WORD = migration(state="aborted", runs_at="nowhere", epoch=3, problem=REFUSED)


def test_what_the_journal_must_say() -> None:
    assert is_refused(WORD)
    for change in (
        {"role": "destination"},
        {"state": "postcopy-paused"},
        {"ended_at": NOW},
        {"epoch": None},
        {"problem": None},
    ):
        assert not is_refused(WORD.model_copy(update=change)), change


@pytest.mark.e2e
@pytest.mark.skipif(not qemu_binaries(), reason="no qemu-system-x86_64")
async def test_what_could_not_be_journalled_does_not_run_yet(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with Store(tmp_path / "db") as store:
        store.journal(WORD.model_copy(update={"state": "postcopy"}), qmp=path)
        job = StandInJob(store, WORD)  # it heard the refusal, and its disk is full
        async with unshared_switch(qemu_binaries()[-1], tmp_path) as source:
            assert await take_back(job, source, path, 10) is None
            async with QmpMachine.connect(path, 10) as again:
                assert await again.run_state() == "finish-migrate"
                job.journal()
                assert await take_back(job, again, path, 10) == "source"
                assert await again.run_state() == "running"
