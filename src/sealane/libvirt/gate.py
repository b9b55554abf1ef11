"""What the migrating client may say to the source's own libvirtd: the last word waits for the hand-over.

libvirt's client ends a migration at the source with CONFIRM3: `cancelled` 0 ends the source's copy, 1 lets it run again. Left to
itself it says 1 when it lost the destination after its Finish, where another copy may run already. Here

* cancelled 0 is held until the hand-over is done,
* cancelled 1 goes through while this host may still resume the domain, and never after the domain was given up.

Everything else passes as it is: the client is the agent's own, and root's.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from sealane.libvirt.rpc import REMOTE_PROGRAM, MessageReader, MessageType, Procedure, RpcMessage


class Word(StrEnum):
    """What the client wants to say last."""

    DONE = "done"  # end the source's copy
    BACK = "back"  # let it run again


@dataclass
class ConfirmGate:
    """Bytes go in; those that may pass come out. `word` is set once the client has said its last word."""

    is_released: bool = False
    word: Word | None = None
    held: bytes = b""
    _reader: MessageReader = field(default_factory=MessageReader, repr=False)

    def feed(self, data: bytes) -> bytes:
        """What goes to libvirtd now; raises PeerError `libvirt.malformed`."""
        return b"".join(self._judge(message) for message in self._reader.feed(data))

    def _judge(self, message: RpcMessage) -> bytes:
        if not _is_confirm(message):
            return message.raw
        cancelled = any(message.raw[-4:])
        self.word = Word.BACK if cancelled else Word.DONE
        if cancelled and not self.is_released:
            return message.raw
        self.held = b"" if cancelled else message.raw
        return b""

    def let_go(self) -> bytes:
        """The hand-over is done: the word that ends the source's copy, if the client has said it."""
        held, self.held = self.held, b""
        return held


def _is_confirm(message: RpcMessage) -> bool:
    return (message.program, message.kind, message.procedure) == (
        REMOTE_PROGRAM,
        MessageType.CALL,
        Procedure.DOMAIN_MIGRATE_CONFIRM3_PARAMS,
    )
