"""The enclave's line to its host's quoting process: it asks, and the answers come to the enclave's loop.

The first question is this host's policy; a migration's evidence is asked for in the middle of the handshake.
"""

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Final

from pydantic import ValidationError

from sealane.attest.asking import ANSWER_MAX, Cutter, Question, encode_question, parse_answer
from sealane.attest.known import parse_known
from sealane.attest.peer import Expectations, PeerJudge
from sealane.attest.reference import NO_REFERENCE, parse_reference
from sealane.errors import HostError, InternalError
from sealane.limits import QUOTE_TIMEOUT_S

_READ_BYTES: Final = 256 * 1024

Heard = Callable[[dict[str, bytes]], None]


class QuotingLine:
    """One connection. `ask` a question with what is to be done with its answer; one at a time."""

    def __init__(self, connection: socket.socket, clock: Callable[[], float]) -> None:
        self.connection, self._clock = connection, clock
        self._cutter = Cutter(ANSWER_MAX)
        self._heard: Heard | None = None
        self._asked_at = 0.0
        connection.settimeout(QUOTE_TIMEOUT_S)  # for questions, which always fit; answers are read when they are there

    def ask(self, question: Question, heard: Heard) -> None:
        """Ask; raises HostError `quoting.failed`."""
        if self._heard is not None:
            raise InternalError("internal.error", "a second question before the first one's answer")
        self._heard, self._asked_at = heard, self._clock()
        try:
            self.connection.sendall(encode_question(question))
        except OSError as error:
            raise HostError("quoting.failed", f"the quoting process is gone: {error.strerror}") from error

    def on_readable(self) -> bool:
        """Read what is there; False where the process is gone and nothing was asked: the next question will tell.

        Raises HostError, or the error that the quoting process gave.
        """
        try:
            data = self.connection.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return True
        except ConnectionError:
            data = b""
        if not data:
            if self._heard is not None:
                raise HostError("quoting.failed", "the quoting process is gone")
            return False
        for body in self._cutter.receive(data):
            heard, self._heard = self._heard, None
            if heard is None:
                raise HostError("quoting.failed", "the quoting process answers what was not asked")
            heard(parse_answer(body))
        return True

    def check_time(self) -> None:
        """Raise HostError `quoting.slow` where an answer is overdue."""
        if self._heard is not None and self._clock() - self._asked_at > QUOTE_TIMEOUT_S:
            raise HostError("quoting.slow")

    def close(self) -> None:
        """Close it."""
        with contextlib.suppress(OSError):
            self.connection.close()


def make_judge_maker(policy: Mapping[str, bytes], clock: Callable[[], datetime]) -> Callable[[str, str], PeerJudge]:
    """Who appraises peers, as this host's policy has it; raises EvidenceError or InternalError where it cannot be read."""
    try:
        expectations = Expectations.model_validate(json.loads(policy["expectations"]))
    except (KeyError, ValueError, ValidationError) as error:
        raise InternalError("internal.error", f"the policy cannot be read: {type(error).__name__}") from error
    reference = NO_REFERENCE
    if "reference" in policy:
        reference = parse_reference(policy["reference"], key=policy.get("reference-key"))
    collateral = {name: content for name, content in policy.items() if name.startswith("collateral.")}
    known = parse_known(policy.get("known", b""))
    return lambda name, key: PeerJudge(name, key, clock, expectations, reference, collateral, known.introduced(name))
