"""What a destination answers a source that is in doubt: its journal's word, and never more than that.

    the journal says                           answer
    no such migration of this peer and VM      unsettled: unknown
    under way, or not ended                    unsettled: under-way
    completed, the VM runs or ran here         ran
    completed, and its QEMU was lost           unsettled: gone
    completed, and it is not known where       unsettled: under-way
    aborted                                    promise: the copy is destroyed and never ran, and never will

`aborted` is journalled only when what was launched here is gone, and an id is taken once: no ticket of this migration can
be followed any more. The promise is journalled with the ticket's epoch before it is given.
"""

from dataclasses import dataclass
from typing import Any

from sealane.errors import SealaneError
from sealane.host.jobs import Jobs
from sealane.host.migration.messages import Answer, Ask, Promise, Ran, Unsettled
from sealane.host.models import Migration, Resolution
from sealane.host.store import Store, utc_now


@dataclass(frozen=True)
class Asker:
    """Who asks: the fingerprint, or for a fleet's host, which may have renewed it, the name that its CA vouches for."""

    fingerprint: str
    vouched_name: str | None = None

    def sent(self, migration: Migration) -> bool:
        """Whether it was this peer that sent the VM."""
        return migration.peer_fingerprint == self.fingerprint or migration.peer == self.vouched_name


def answer(jobs: Jobs, store: Store, ask: Ask, asker: Asker) -> tuple[Answer, Migration | None]:
    """The answer to this peer, and the migration that it is about, where there is one.

    Raises host.store, host.disk-full: then nothing may be said.
    """
    about: dict[str, Any] = {"migration": ask.migration, "vm": ask.vm, "epoch": ask.epoch}
    jobs.write_ends()  # the answer rests on what is on the disk
    found = _known(jobs, ask, asker)
    if found is None:
        return Unsettled(**about, reason="unknown", detail="the journal has no such migration of this peer"), None
    if jobs.is_under_way(found.id):
        return Unsettled(**about, reason="under-way", detail=f"the migration is {found.state} here"), found
    if found.state == "aborted":
        return Promise(**about), _promised(store, found, ask)
    if found.state != "completed" or found.runs_at == "in-doubt":
        return Unsettled(**about, reason="under-way", detail="it is not known here whether the VM runs"), found
    if found.epoch != ask.epoch:
        return Unsettled(**about, reason="unknown", detail="the journal has another epoch"), found
    if found.runs_at != "destination":
        return Unsettled(**about, reason="gone", detail="the ticket was taken, and the QEMU was lost"), found
    return Ran(**about), found


def _known(jobs: Jobs, ask: Ask, asker: Asker) -> Migration | None:
    try:
        found = jobs.find(ask.migration)
    except SealaneError:
        return None
    same = (found.id, found.vm, found.role) == (ask.migration, ask.vm, "destination")
    return found if same and asker.sent(found) else None


def _promised(store: Store, found: Migration, ask: Ask) -> Migration:
    if found.resolution is not None:  # asked before
        return found
    words = f"{found.peer} asked; the ticket with epoch {ask.epoch} is void here"
    resolution = Resolution(decision="promised", by="journal", answer="promise", words=words, at=utc_now())
    promised = found.model_copy(update={"resolution": resolution})
    store.journal(promised)
    return promised
