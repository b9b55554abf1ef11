"""A host that lies: `python -m sealane.testing.malice FILE sealane.cli agent …`.

It is `sealane agent …`; its enclaves and its quoting process are the real ones with a few methods wrapped, as whoever owns a
host can have them, except that the log of this host does not tell. FILE holds the name of the lie that is told next, one of
`LIES`, or `relay` and the words that `sealane.testing.relay` wants, or nothing; it is read for each enclave and each piece of
evidence. What the host cannot do is what its TPM does not do.
"""

import functools
import hashlib
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from sealane.enclave.sandbox import Sandbox
from sealane.session.attestation import Attestation, Conversation, Round, Send
from sealane.session.exchange import SEED_BYTES, AttestMessage, AttestReader, End, MessageKind
from sealane.testing.relay import encode_asked, fetch_evidence

_WORDS_BYTES_MAX: Final = 512
_STALE: Final = b"\x05" * 32
_OTHER_MIGRATION: Final = b"\x06" * 16


class Lie:
    """What FILE says now; the descriptor outlives the loss of every privilege."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.name, self.words = "", [""]

    def refresh(self) -> str:
        """Read it anew."""
        self.words = os.pread(self._descriptor, _WORDS_BYTES_MAX, 0).decode().split() or [""]
        self.name = self.words[0]
        return self.name


# ---- messages: what this end says in the handshake


def _stale_nonce(said: AttestMessage, heard: bytes) -> AttestMessage:
    if said.kind is not MessageKind.SHOW:
        return said
    if said.sender is End.SOURCE:
        return replace(said, nonce_destination=_STALE)
    return replace(said, nonce_source=_STALE)


def _swapped_role(said: AttestMessage, heard: bytes) -> AttestMessage:
    peer = None if said.sender is None else said.sender.peer
    return replace(said, sender=peer) if said.kind is MessageKind.SHOW else said


def _another_migration(said: AttestMessage, heard: bytes) -> AttestMessage:
    return replace(said, migration=_OTHER_MIGRATION) if said.kind is MessageKind.SHOW else said


def _swapped_seeds(said: AttestMessage, heard: bytes) -> AttestMessage:
    return replace(said, body=(heard or _STALE) + said.body[SEED_BYTES:]) if said.kind is MessageKind.SHOW else said


MESSAGE_LIES: Final[dict[str, Callable[[AttestMessage, bytes], AttestMessage]]] = {
    "stale-nonce": _stale_nonce,
    "swapped-role": _swapped_role,
    "another-migration": _another_migration,
    "swapped-seeds": _swapped_seeds,
}
# Told by wrapping something else: the peer's own words, what is quoted, what the root of trust says.
LIES: Final = (
    *MESSAGE_LIES,
    "reflection",
    "quoted-for-another-migration",
    "replayed-quote",
    "another-channel",
    "boot-log",
)


def _in_the_enclave(lie: Lie) -> None:
    from sealane.enclave import launcher  # noqa: PLC0415 - each process loads what it needs

    start, say, receive, quoted = launcher._start, Round._say, Attestation.receive, Round._report_data

    def lying_start(control: socket.socket, calls: int, agent: int, sandbox: Sandbox) -> None:
        lie.refresh()  # before the fork, which can read nothing
        start(control, calls, agent, sandbox)

    def lying_say(self: Round, kind: MessageKind, body: bytes) -> Send:
        sent = say(self, kind, body)
        change = MESSAGE_LIES.get(lie.name)
        if change is None:
            return sent
        (message,) = AttestReader().receive(sent.data)
        return Send(change(message, self._seeds.get(self.role.peer, b"")).encode())

    def lying_receive(self: Attestation, message: AttestMessage) -> list[Any]:
        if lie.name == "reflection" and message.kind is MessageKind.SHOW:
            return [Send(message.encode())]
        return receive(self, message)

    def lying_report_data(self: Round, role: Any) -> bytes:
        if lie.name == "relay" and role is self.role:  # not to be quoted, but what the other host shall be asked with
            return encode_asked(self._conversation.migration, self.peer_nonce, self._need_subject().epoch)
        if lie.name != "quoted-for-another-migration" or role is not self.role:
            return quoted(self, role)
        true = self._conversation
        facts = (true.own_certificate, true.peer_certificate, true.exporter, true.key_pem, true.peer_key)
        self._conversation = Conversation(_OTHER_MIGRATION, *facts)
        try:
            return quoted(self, role)
        finally:
            self._conversation = true

    launcher._start = lying_start
    Round._say = lying_say  # type: ignore[method-assign]
    Attestation.receive = lying_receive  # type: ignore[method-assign]
    Round._report_data = lying_report_data  # type: ignore[method-assign]


def _in_the_quoting_process(lie: Lie) -> None:
    from sealane.quoting.process import Platform  # noqa: PLC0415 - each process loads what it needs

    evidence = Platform.evidence
    kept: dict[str, bytes] = {}

    def lying_evidence(self: Platform, user_data: bytes) -> dict[str, bytes]:
        name = lie.refresh()
        if name == "relay":
            return {**evidence(self, user_data), **fetch_evidence(self.configuration, user_data, lie.words[1:])}
        if name == "replayed-quote" and kept:
            return kept
        if name == "another-channel":  # all that a relay has: this host's own true evidence, for another channel
            user_data = hashlib.sha256(user_data).digest()
        pieces = evidence(self, user_data)
        kept.update({} if kept else pieces)
        if name == "boot-log":
            log = bytearray(pieces["boot-log"])
            log[log.index(b"simulated loader") - 8] ^= 1  # a digest of it
            return {**pieces, "boot-log": bytes(log)}
        return pieces

    Platform.evidence = lying_evidence  # type: ignore[method-assign]


def _in_the_agent(path: str) -> None:
    """Its children are this program, too."""
    popen = subprocess.Popen

    @functools.wraps(popen, updated=())
    def lying_popen(argv: Any, *arguments: Any, **options: Any) -> Any:
        for program in ("sealane.enclave", "sealane.quoting"):
            if isinstance(argv, list) and program in argv:
                at = argv.index(program)
                argv = [*argv[:at], "sealane.testing.malice", path, *argv[at:]]
        return popen(argv, *arguments, **options)

    subprocess.Popen = lying_popen  # type: ignore[misc,assignment]


def main() -> None:
    """Be the program that is named."""
    path, program = sys.argv[1:3]
    sys.argv = [program, *sys.argv[3:]]
    if program == "sealane.enclave":
        _in_the_enclave(Lie(path))
    elif program == "sealane.quoting":
        _in_the_quoting_process(Lie(path))
    else:
        _in_the_agent(path)
    runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
