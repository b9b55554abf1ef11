"""How a postcopy rests where its two ends cannot bring it to an end by themselves.

lost    a fault killed the QEMU that held a half of the VM's memory: QEMU's own limit of postcopy
split   the lanes broke as QEMU made its switch: all came through, and the source's QEMU calls the switch failed. It has the whole
        VM, paused, and gives no page any more; the destination's has what came before. A person says which one counts
        (`docs/handover.md`, "Postcopy")
"""

from collections.abc import Callable, Collection
from typing import Final, Literal

from sealane.host.models import Migration
from sealane.session.handover import IN_POSTCOPY
from sealane.testing.faultdirector import KILLS_QEMU, Fault

Rest = Literal["", "lost", "split"]
# What breaks the lanes, at once or with the process that holds them.
BREAKS_LANES: Final[frozenset[Fault]] = KILLS_QEMU | {"kill-agent", "term-agent", "kill-enclave", "cut-link"}


def how_it_rests(
    source: Migration | None,
    destination: Migration | None,
    ask_source: Callable[[], str],
    ask_destination: Callable[[], str],
) -> Rest:
    """What the two ends' words come to; "" where they may still come to an end by themselves.

    `ask_source` and `ask_destination` give what that QEMU says of its migration, "" where there is no QEMU.
    """
    if source is None or destination is None or source.state not in IN_POSTCOPY:
        return ""
    if (destination.state, destination.runs_at) == ("completed", "nowhere"):
        return "lost"
    if destination.state != "postcopy-paused":
        return ""
    told = ask_source()
    if not told:
        return "lost"
    return "split" if told == "failed" and source.state == "postcopy-paused" and ask_destination() else ""


def why_not(rest: Rest, fired: Collection[str], *, was_cut: bool) -> str:
    """Why that must not be what these faults came to; "" where they can have no better end.

    `was_cut`: on this trip the line is cut without any fault.
    """
    if rest == "lost" and not KILLS_QEMU & set(fired):
        return "a half of the VM's memory is gone, and no fault took it"
    if rest == "split" and not was_cut and not BREAKS_LANES & set(fired):
        return "the switch failed, and nothing broke a lane"
    return ""
