"""A stand-in for the quoting process: a thread that answers one enclave with the plain key of an identity."""

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Mapping

from sealane.attest.asking import QUESTION_MAX, Cutter, EvidenceAsked, encode_answer, parse_question
from sealane.crypto.identity import Identity
from sealane.errors import SealaneError
from tests.session.rig import software_evidence

Quote = Callable[[bytes], "Mapping[str, bytes] | SealaneError"]


def quoting_line(
    identity: Identity,
    *,
    policy: Mapping[str, bytes] | None = None,
    quote: Quote | None = None,
) -> tuple[socket.socket, threading.Thread]:
    """The enclave's end of a line, and the thread at the other one, which ends with the enclave."""
    mine, theirs = socket.socketpair()
    expected = {"expectations": json.dumps({}).encode(), **(policy or {})}
    make = quote or (lambda user_data: software_evidence(identity, user_data))

    def serve() -> None:
        cutter = Cutter(QUESTION_MAX)
        with mine:
            while data := mine.recv(4096):
                for text in cutter.receive(data):
                    question = parse_question(text)
                    answer = make(question.user_data) if isinstance(question, EvidenceAsked) else expected
                    mine.sendall(encode_answer(answer))

    def quietly() -> None:
        with contextlib.suppress(OSError):  # the enclave was killed
            serve()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    return theirs, thread
