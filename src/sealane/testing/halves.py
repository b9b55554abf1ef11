"""How a postcopy rests where its two ends cannot bring it to an end: what the fault took is more than they can make good.

lost    a fault killed the QEMU that held a half of the VM's memory: QEMU's own limit of postcopy
stuck   a fault broke the lanes within the switch: the source's QEMU has sent the devices' state and believes in postcopy, and the
        destination's never had it. The VM is whole at the source, and QEMU 10.0 has no command that lets it run there
        (`docs/handover.md`, "Postcopy")
"""

from collections.abc import Callable, Collection
from typing import Final, Literal

from sealane.host.models import Migration
from sealane.session.handover import IN_POSTCOPY
from sealane.testing.faultdirector import KILLS_QEMU, Fault

Rest = Literal["", "lost", "stuck"]
# What breaks the lanes, at once or with the process that holds them.
BREAKS_LANES: Final[frozenset[Fault]] = KILLS_QEMU | {"kill-agent", "term-agent", "kill-enclave", "cut-link"}
_BELIEVES_IN_POSTCOPY: Final = frozenset(
    {"postcopy-active", "postcopy-paused", "postcopy-recover-setup", "postcopy-recover"}
)


def how_it_rests(source: Migration | None, destination: Migration | None, ask_source: Callable[[], str]) -> Rest:
    """What the two ends' words come to; "" where they may still come to an end by themselves.

    `ask_source` gives what the source's QEMU says of its migration, "" where there is no QEMU.
    """
    if source is None or destination is None:
        return ""
    if source.state in IN_POSTCOPY:
        vm_is_gone = (destination.state, destination.runs_at) == ("completed", "nowhere")
        return "lost" if vm_is_gone or (destination.state == "postcopy-paused" and not ask_source()) else ""
    is_kept = source.state == "aborted" and source.ended_at is None
    if is_kept and destination.state == "aborted" and destination.ended_at is not None:
        return "stuck" if ask_source() in _BELIEVES_IN_POSTCOPY else ""
    return ""


def why_not(rest: Rest, fired: Collection[str]) -> str:
    """Why that must not be what these faults came to; "" where they can have no better end."""
    if rest == "lost" and not KILLS_QEMU & set(fired):
        return "a half of the VM's memory is gone, and no fault took it"
    if rest == "stuck" and not BREAKS_LANES & set(fired):
        return "the switch failed, and no fault broke a lane"
    return ""
