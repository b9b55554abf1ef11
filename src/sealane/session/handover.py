"""The hand-over as a state machine without I/O: which state follows which on what, for either role.

The invariant (`docs/handover.md`): at no time do two copies of a VM run, and no failure leaves none that can run.

    source        preparing -> copying -> switching-over -> handing-over -> completed
    destination   preparing -> copying -> switching-over -> handing-over -> completed

* The source enters `handing-over` only by journalling `released`: from then on it never resumes the VM, unless the
  destination says that it refused the ticket and destroyed its copy. Before it, every doubt resumes the VM at the source.
* The destination enters `handing-over` by journalling the ticket; only then does it resume the VM.
* A ticket that certainly never left this host's agent (`not-sent`) was given to nobody: the source resumes the VM.
* A source that loses the peer while handing over is `in-doubt`: the VM stays paused.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from sealane.errors import ControlError


class State(StrEnum):
    """Where a migration stands; the names are those of the interface and of the journal."""

    PREPARING = "preparing"
    COPYING = "copying"
    SWITCHING_OVER = "switching-over"
    HANDING_OVER = "handing-over"
    COMPLETED = "completed"
    ABORTED = "aborted"
    IN_DOUBT = "in-doubt"


class Role(StrEnum):
    """Which end of the lane this is."""

    SOURCE = "source"
    DESTINATION = "destination"


class Input(StrEnum):
    """What happened; past tense, as events are named throughout."""

    PREPARED = "prepared"  # both ends checked, lanes open
    VM_STOPPED = "vm-stopped"  # QEMU paused the VM for the switch-over
    RELEASED = "released"  # source: journalled that it gives the VM up
    NOT_SENT = "not-sent"  # source: the ticket could not be given even to the own enclave
    TICKET_JOURNALLED = "ticket-journalled"  # destination: journalled that the VM is its own
    RECEIPT = "receipt"  # source: received; destination: sent, the VM runs
    FAILED = "failed"  # anything that went wrong, cancel included
    REFUSED = "refused"  # the destination refused the ticket and destroyed its copy (source: was told so)


ENDED: Final = frozenset({State.COMPLETED, State.ABORTED})

_COMMON: Mapping[State, Mapping[Input, State]] = {
    State.PREPARING: {Input.PREPARED: State.COPYING, Input.FAILED: State.ABORTED},
    State.COPYING: {Input.VM_STOPPED: State.SWITCHING_OVER, Input.FAILED: State.ABORTED},
}

TRANSITIONS: Final[Mapping[Role, Mapping[State, Mapping[Input, State]]]] = {
    Role.SOURCE: {
        **_COMMON,
        State.SWITCHING_OVER: {Input.RELEASED: State.HANDING_OVER, Input.FAILED: State.ABORTED},
        State.HANDING_OVER: {
            Input.RECEIPT: State.COMPLETED,
            Input.REFUSED: State.ABORTED,
            Input.NOT_SENT: State.ABORTED,
            Input.FAILED: State.IN_DOUBT,
        },
        State.IN_DOUBT: {Input.RECEIPT: State.COMPLETED, Input.REFUSED: State.ABORTED, Input.FAILED: State.IN_DOUBT},
        State.COMPLETED: {},
        State.ABORTED: {},
    },
    Role.DESTINATION: {
        **_COMMON,
        State.SWITCHING_OVER: {Input.TICKET_JOURNALLED: State.HANDING_OVER, Input.FAILED: State.ABORTED},
        # The ticket is ours: a lost link changes nothing. Only a copy that never ran and is destroyed may be refused.
        State.HANDING_OVER: {
            Input.RECEIPT: State.COMPLETED,
            Input.FAILED: State.COMPLETED,
            Input.REFUSED: State.ABORTED,
        },
        State.COMPLETED: {},
        State.ABORTED: {},
    },
}


class Handover:
    """One migration's state; `step` is the only way to change it."""

    def __init__(self, role: Role, state: State = State.PREPARING) -> None:
        self.role = role
        self.state = state

    def after(self, happened: Input) -> State:
        """The state that follows; raises ControlError `migration.over` where the table has no such step."""
        following = TRANSITIONS[self.role][self.state].get(happened)
        if following is None:
            raise ControlError("migration.over", f"{self.role} is {self.state}: {happened} cannot happen there")
        return following

    def step(self, happened: Input) -> State:
        """Move on; raises as `after` does."""
        self.state = self.after(happened)
        return self.state

    @property
    def may_resume_here(self) -> bool:
        """Whether this end may let the VM run now, by the table alone."""
        if self.role is Role.SOURCE:
            return self.state in {State.PREPARING, State.COPYING, State.SWITCHING_OVER, State.ABORTED}
        return self.state in {State.HANDING_OVER, State.COMPLETED}
