"""`./run bench attest`: what attestation costs before a copy begins.

    quote       the quoting process's answer: a swtpm's quote of boot, IMA and platform log, or a statement of a plain key
    appraisal   signature, binding, logs replayed, reference values compared
    handshake   TLS, hellos, both phases, both ends after one another in one process, quotes answered at once

Goal: at most 400 ms added before the copy, a TPM's own time apart. Medians; both ends share one process here, which a migration
does not, so that the sum is an upper bound of what is computed.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sealane.attest.peer import Expectations, PeerJudge
from sealane.attest.reference import Reference
from sealane.crypto.aead import CIPHER_NAME
from sealane.crypto.identity import Identity, create_identity, save_identity
from sealane.quoting.interface import Configure
from sealane.quoting.process import Platform
from sealane.session.attestation import Subject
from sealane.session.channel import Attestor, Channel, Established, EvidenceWanted, Role
from sealane.testing.hosts import make_hosts
from sealane.testing.hosttpm import boot_with_tpm

GOAL_MS: Final = 400.0
_MIGRATION: Final = "0123456789abcdef" * 2
_DATA: Final = bytes(range(32))
Evidence = Mapping[str, bytes]


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="./run bench attest", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each thing is done (15)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    figures = measure(options.rounds)
    for name, value in figures.items():
        print(f"{name:34} {value:8.1f} ms")
    added = figures["handshake, evidence of a TPM"]
    print(
        f"{'goal: added, TPM apart':34} {GOAL_MS:8.1f} ms   {'met' if added <= GOAL_MS else 'MISSED'}: {added:.1f} ms"
    )
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def measure(rounds: int) -> dict[str, float]:
    """Medians in ms."""
    identity = create_identity("bench", now=datetime.now(UTC))
    with make_hosts(["bench"], network="loopback") as (host,):
        save_identity(host.paths, identity)
        tpm = boot_with_tpm(host, [Path(sys.executable)])
        facts: dict[str, Any] = {
            "identity_key": str(host.paths.identity_key),
            "started_ns": time.time_ns(),
            "state": str(host.paths.state),
        }
        begun = time.perf_counter()
        plain = Platform(Configure(drivers=["software"], run=str(host.scratch / "plain"), **facts))
        launched = (time.perf_counter() - begun) * 1e3
        logs: dict[str, Any] = {"boot_log": str(tpm.boot_log), "runtime_log": str(tpm.runtime_log), "tcti": tpm.tcti}
        rooted = Platform(Configure(drivers=["tpm2"], run=str(host.paths.run), **facts, **logs))
        for platform in (plain, rooted):
            platform.measure_binaries([sys.executable])
        values = {**rooted.own_reference(), "ima": {"digests": tpm.files}, "accept_test_roots": True}
        reference = Reference.model_validate(values)
        evidence = rooted.evidence(_DATA)
        judge = _judge("bench", "00" * 32, reference)
        figures = {
            "measuring at the agent's start": launched,
            "quote, plain key": _median(rounds, lambda: plain.evidence(_DATA)),
            "quote, swtpm": _median(rounds, lambda: rooted.evidence(_DATA)),
            "appraisal, evidence of a TPM": _median(rounds, lambda: judge.appraise(evidence, _DATA)),
            "handshake, plain keys": _median(rounds, lambda: _handshake(identity, plain.evidence, None)),
        }
        whole = _Stopwatch(rooted.evidence)
        total = _median(rounds, lambda: _handshake(identity, whole.evidence, reference))
        figures["handshake with quotes of a swtpm"] = total
        figures["handshake, evidence of a TPM"] = total - whole.median_ms * 2
        return figures


class _Stopwatch:
    """Evidence, and how long it took."""

    def __init__(self, make: Callable[[bytes], Evidence]) -> None:
        self._make, self._taken = make, [0.0]

    def evidence(self, user_data: bytes) -> Evidence:
        """One answer."""
        begun = time.perf_counter()
        pieces = self._make(user_data)
        self._taken.append((time.perf_counter() - begun) * 1e3)
        return pieces

    @property
    def median_ms(self) -> float:
        """Of all answers."""
        return statistics.median(self._taken[1:] or self._taken)


def _median(rounds: int, work: Callable[[], object]) -> float:
    taken = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        taken.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(taken)


def _judge(name: str, key: str, reference: Reference | None) -> PeerJudge:
    wanted = Expectations(least_level=3, accepted_test_roots=["software-tpm"]) if reference else Expectations()
    return PeerJudge(name, key, lambda: datetime.now(UTC), wanted, reference or Reference(version=1))


def _handshake(identity: Identity, evidence: Callable[[bytes], Evidence], reference: Reference | None) -> None:
    """From the first byte to Established at both ends; raises where an end refuses."""
    ends = [_channel(identity, role, reference) for role in ("source", "destination")]
    established = 0
    while established < len(ends):
        for mouth, ear in (ends, ends[::-1]):
            events = list(ear.receive(mouth.bytes_to_send()))
            while events:
                event = events.pop(0)
                if isinstance(event, EvidenceWanted):
                    events += ear.evidence_made(evidence(event.report_data))
                established += isinstance(event, Established)


def _channel(identity: Identity, role: Role, reference: Reference | None) -> Channel:
    return Channel(
        identity,
        role=role,
        migration=_MIGRATION,
        trusted={identity.fingerprint: identity.name},
        protection="sealed",
        cipher=CIPHER_NAME,
        now=datetime.now(UTC),
        attestor=Attestor(
            Subject("vm", 1) if role == "source" else None,
            lambda name, key: _judge(name, key, reference),
            os.urandom,
        ),
    )
