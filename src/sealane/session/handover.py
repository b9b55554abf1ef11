"""The hand-over as a state machine without I/O: which state follows which on what, for either role.

The invariant (`docs/handover.md`): at no time do two copies of a VM run, and no failure leaves none that can run.

    source        preparing -> copying -> switching-over -> handing-over -> completed
    destination   preparing -> copying -> switching-over -> handing-over -> completed

* The source enters `handing-over` only by journalling `released`: from then on it never resumes the VM, unless the
  destination says that it refused the ticket and destroyed its copy. Before it, every doubt resumes the VM at the source.
* The destination enters `handing-over` by journalling the ticket; only then does it resume the VM.
* A ticket that certainly never left this host's agent (`not-sent`) was given to nobody: the source resumes the VM.
* A source that loses the peer while handing over is `in-doubt`: the VM stays paused, and the source asks the destination
  what became of it. `receipt` and `refused` are then the destination's journalled answer.
* Where the destination cannot tell, an operator who has looked there decides: `own-here` or `drop-here`.

By postcopy, where the VM runs at the destination before all of its memory is there:

    source        … switching-over -> postcopy <-> postcopy-paused -> completed
    destination   copying -> switching-over (ticket held) -> postcopy <-> postcopy-paused -> completed

* The ticket is given before the switch, and lets nothing run: what the destination lacks comes with QEMU's switch alone.
* The source enters `postcopy` by journalling that it gives the VM up; only then is its QEMU told to switch. Before it,
  every doubt resumes the VM at the source.
* The destination enters `postcopy` when its QEMU has switched; only then does it resume the VM.
* From then on the memory is in two halves, and each end keeps its own. A cut (`failed`) leads to `postcopy-paused`, from
  which only joining the halves again leads on, or the destination's word that all had arrived; or the word of an operator who has
  seen that the other half is lost: `drop-here`, which ends the VM, or `own-here` at a source whose QEMU has made no switch, or
  failed to, and has the VM whole.
* A destination whose QEMU did not come through the switch destroys it and refuses: the VM never ran there.
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
    POSTCOPY = "postcopy"
    POSTCOPY_PAUSED = "postcopy-paused"
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
    TICKET_HELD = "ticket-held"  # destination: journalled the ticket of a switch to postcopy
    SWITCHED = "switched"  # source: journalled that QEMU switches to postcopy; destination: its QEMU did
    REJOINED = "rejoined"  # both QEMUs go on with postcopy over new lanes
    ARRIVED = "arrived"  # all pages are at the destination (source: was told so)
    RECEIPT = "receipt"  # source: received; destination: sent, the VM runs
    FAILED = "failed"  # anything that went wrong, cancel included
    REFUSED = "refused"  # the destination refused the ticket and destroyed its copy (source: was told so)
    OWN_HERE = "own-here"  # source that has the whole VM: an operator decided that it is this host's
    # source in doubt: an operator decided that it is the destination's; either end: that the other half of its memory is lost
    DROP_HERE = "drop-here"


ENDED: Final = frozenset({State.COMPLETED, State.ABORTED})
# The VM's memory is in two halves.
IN_POSTCOPY: Final = frozenset({State.POSTCOPY, State.POSTCOPY_PAUSED})

_COMMON: Mapping[State, Mapping[Input, State]] = {
    State.PREPARING: {Input.PREPARED: State.COPYING, Input.FAILED: State.ABORTED},
    State.COPYING: {Input.VM_STOPPED: State.SWITCHING_OVER, Input.FAILED: State.ABORTED},
}

_HALVED: Mapping[State, Mapping[Input, State]] = {
    State.POSTCOPY: {Input.ARRIVED: State.COMPLETED, Input.FAILED: State.POSTCOPY_PAUSED},
    State.POSTCOPY_PAUSED: {
        Input.REJOINED: State.POSTCOPY,
        Input.ARRIVED: State.COMPLETED,
        Input.DROP_HERE: State.COMPLETED,
        Input.FAILED: State.POSTCOPY_PAUSED,
    },
}

TRANSITIONS: Final[Mapping[Role, Mapping[State, Mapping[Input, State]]]] = {
    Role.SOURCE: {
        **_COMMON,
        State.SWITCHING_OVER: {
            Input.RELEASED: State.HANDING_OVER,
            Input.SWITCHED: State.POSTCOPY,
            Input.FAILED: State.ABORTED,
        },
        State.HANDING_OVER: {
            Input.RECEIPT: State.COMPLETED,
            Input.REFUSED: State.ABORTED,
            Input.NOT_SENT: State.ABORTED,
            Input.FAILED: State.IN_DOUBT,
        },
        State.IN_DOUBT: {
            Input.RECEIPT: State.COMPLETED,
            Input.REFUSED: State.ABORTED,
            Input.OWN_HERE: State.ABORTED,
            Input.DROP_HERE: State.COMPLETED,
            Input.FAILED: State.IN_DOUBT,
        },
        State.POSTCOPY: {**_HALVED[State.POSTCOPY], Input.REFUSED: State.ABORTED},
        State.POSTCOPY_PAUSED: {
            **_HALVED[State.POSTCOPY_PAUSED],
            Input.REFUSED: State.ABORTED,
            Input.OWN_HERE: State.ABORTED,
        },
        State.COMPLETED: {},
        State.ABORTED: {},
    },
    Role.DESTINATION: {
        **_COMMON,
        State.COPYING: {**_COMMON[State.COPYING], Input.TICKET_HELD: State.SWITCHING_OVER},
        State.SWITCHING_OVER: {
            Input.TICKET_JOURNALLED: State.HANDING_OVER,
            Input.SWITCHED: State.POSTCOPY,
            Input.REFUSED: State.ABORTED,
            Input.FAILED: State.ABORTED,
        },
        # The ticket is ours: a lost link changes nothing. Only a copy that never ran and is destroyed may be refused.
        State.HANDING_OVER: {
            Input.RECEIPT: State.COMPLETED,
            Input.FAILED: State.COMPLETED,
            Input.REFUSED: State.ABORTED,
        },
        **_HALVED,
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
        return self.state in {State.HANDING_OVER, State.COMPLETED} | IN_POSTCOPY
