"""The enclave's part in the journey of a VM's TPM: the four operations, on the link to the VM's keeper.

    source        QEMU wants a state      tpm_state_read, volatile_state_enc
    destination   QEMU brings a state     volatile_state_dec, tpm_state_write

The key of the second and third is made from the migration's secret here and is never told to anybody.
"""

import contextlib
import socket
from typing import Final

from sealane.errors import PeerError, SealaneError
from sealane.vtpm.control import BlobType
from sealane.vtpm.envelope import StateSealer
from sealane.vtpm.link import Frame, Link, What

# The keeper has only to ask swtpm, whose TPM does nothing else then.
_ANSWER_TIMEOUT_S: Final = 10.0


class VtpmStates:
    """Serves one link until it is closed."""

    def __init__(self, connection: socket.socket, sealer: StateSealer, *, is_source: bool) -> None:
        self.connection = connection
        self._link, self._sealer, self._is_source = Link(connection, _ANSWER_TIMEOUT_S), sealer, is_source

    def serve(self) -> bool:
        """Answer one question of the keeper's; False when the link is over. Raises what `volatile_state_dec` does."""
        try:
            question = self._link.receive()
        except OSError:
            return False
        try:
            match question.what:
                case What.WANTED if self._is_source:
                    state = self.tpm_state_read(question.blob_type)
                    done = self._sealer.volatile_state_enc(question.blob_type, state)
                case What.OFFERED if not self._is_source:
                    state = self._sealer.volatile_state_dec(question.blob_type, question.data)
                    self.tpm_state_write(question.blob_type, state)
                    done = b""
                case _:
                    raise PeerError("vtpm.blob-malformed", "the TPM's state was asked for in the wrong direction")
            self._link.send(Frame(What.DONE, question.blob_type, done))
        except SealaneError:
            with contextlib.suppress(OSError):
                self._link.send(Frame(What.REFUSED, question.blob_type))
            raise
        except OSError:
            return False
        return True

    def tpm_state_read(self, blob_type: BlobType) -> bytes:
        """One part of the TPM's state in clear, from swtpm through its control channel; raises `vtpm.blob-malformed`, OSError."""
        return self._ask(Frame(What.READ, blob_type))

    def tpm_state_write(self, blob_type: BlobType, state: bytes) -> None:
        """Give swtpm one part of its state; raises `vtpm.blob-malformed`, OSError."""
        self._ask(Frame(What.WRITE, blob_type, state))

    def _ask(self, frame: Frame) -> bytes:
        self._link.send(frame)
        answer = self._link.receive()
        if (answer.what, answer.blob_type) != (What.ANSWER, frame.blob_type):
            raise PeerError("vtpm.blob-malformed", "the TPM's keeper answered something else")
        return answer.data

    def close(self) -> None:
        """Close the link."""
        self._link.close()
