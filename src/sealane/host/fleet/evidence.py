"""The agent's own line to the quoting process: what this host shows its CA, and how a host that asks is appraised.

The quoting process answers whom the agent names, and here that is the agent itself. The user data say which renewal it is
for, under a label that no migration's have, so that this evidence serves nothing else.
"""

import socket

from sealane.attest.asking import (
    ANSWER_MAX,
    Cutter,
    Question,
    encode_question,
    parse_answer,
)
from sealane.errors import HostError
from sealane.limits import QUOTE_TIMEOUT_S

_READ_BYTES = 256 * 1024


def ask_quoting(line: socket.socket, question: Question) -> dict[str, bytes]:
    """One question on a line of its own, which is closed; blocks. Raises HostError `quoting.*` and what the process answers."""
    cutter = Cutter(ANSWER_MAX)
    with line:
        line.settimeout(QUOTE_TIMEOUT_S)
        try:
            line.sendall(encode_question(question))
            while True:
                data = line.recv(_READ_BYTES)
                if not data:
                    raise HostError("quoting.failed", "the quoting process is gone")
                for body in cutter.receive(data):
                    return parse_answer(body)
        except TimeoutError:
            raise HostError("quoting.slow") from None
        except OSError as error:
            raise HostError("quoting.failed", f"the quoting process is gone: {error.strerror}") from error
