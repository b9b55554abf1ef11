"""What a third host does that would pass for another one: it has a challenge answered by that other one.

It is trusted by both. Where a source challenges it, it begins a migration of its own to the honest host, with that source's nonce
and for the same migration, VM and epoch, and shows the source what the honest host's root of trust has quoted.
"""

import socket
import struct
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from sealane.attest.verdict import Verdict
from sealane.crypto.aead import CIPHER_NAME
from sealane.crypto.identity import load_identity
from sealane.errors import AttestationRejected, HostError
from sealane.paths import Paths
from sealane.quoting.interface import Configure
from sealane.session.attestation import Subject
from sealane.session.channel import Attestor, Channel
from sealane.session.preface import ConnectionKind, Preface, encode_preface

_ASKED: Final = struct.Struct(">16s32sQ")
_TIMEOUT_S: Final = 20.0
_READ_BYTES: Final = 64 * 1024


def encode_asked(migration: bytes, nonce: bytes, epoch: int) -> bytes:
    """What the lying enclave tells the lying quoting process in place of user data."""
    return _ASKED.pack(migration, nonce, epoch)


class _Listener:
    """A judge who wants to know the evidence, and nothing else."""

    def __init__(self) -> None:
        self.evidence: dict[str, bytes] = {}

    def check_shown(self, evidence: Mapping[str, bytes], report_data: bytes) -> None:
        self.evidence = dict(evidence)
        raise AttestationRejected("attest.refused", "it has what it wanted")

    def appraise(self, evidence: Mapping[str, bytes], report_data: bytes) -> Verdict:
        raise AttestationRejected("attest.refused")


def fetch_evidence(configuration: Configure, asked: bytes, words: Sequence[str]) -> dict[str, bytes]:
    """The honest host's evidence; `words` are its address, port and fingerprint, and the VM's name. Raises HostError."""
    address, port, fingerprint, vm = words
    migration, nonce, epoch = _ASKED.unpack(asked)
    listener = _Listener()
    rest = [nonce]  # its own nonce is the source's
    channel = Channel(
        load_identity(Paths(Path(configuration.state), Path(configuration.run), Path("/nonexistent"))),
        role="source",
        migration=migration.hex(),
        trusted={fingerprint: "the honest host"},
        protection="sealed",
        cipher=CIPHER_NAME,
        now=datetime.now(UTC),
        attestor=Attestor(
            Subject(vm, epoch), lambda name, key: listener, lambda size: rest.pop() if rest else b"\x07" * size
        ),
    )
    with socket.create_connection((address, int(port)), timeout=_TIMEOUT_S) as connection:
        connection.sendall(encode_preface(Preface(ConnectionKind.CHANNEL, migration)))
        while not listener.evidence:
            connection.sendall(channel.bytes_to_send())
            data = connection.recv(_READ_BYTES)
            if not data:
                raise HostError("quoting.failed", "the honest host hung up")
            try:
                channel.receive(data)
            except AttestationRejected:
                break
    if not listener.evidence:
        raise HostError("quoting.failed", "the honest host showed nothing")
    return listener.evidence
