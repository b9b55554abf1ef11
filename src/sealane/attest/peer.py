"""The peer of a migration: its evidence appraised against this host's expectations, and refused with one code.

Unknown evidence refuses, and so does none. Which code a refusal has follows from its reasons, the most telling first.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from sealane.attest.appraise import Material, appraise
from sealane.attest.reasons import Severity
from sealane.attest.reference import NO_REFERENCE, Reference
from sealane.attest.verdict import Verdict
from sealane.errors import AttestationRejected, EvidenceError

# Reasons in the order in which they say what is wrong; whatever else refuses is `attest.refused`.
_CODES: Final[tuple[tuple[str, frozenset[str]], ...]] = (
    ("attest.binding", frozenset({"binding.empty", "binding.mismatch", "binding.unchecked"})),
    (
        "attest.host-unknown",
        frozenset({"tpm.ak-unknown", "reference.host", "software.key-unknown", "chain.root-unknown"}),
    ),
    ("attest.test-root", frozenset({"tpm.test-root", "chain.test-root"})),
    ("attest.log-replay", frozenset({"tpm.pcr-replay", "tpm.pcr-digest", "platform.replay", "tdx.log-mismatch"})),
    ("attest.enclave-changed", frozenset({"reference.enclave"})),
    ("attest.qemu-changed", frozenset({"reference.qemu"})),
)
_SHOWN: Final = 3
# The word in `accepted_test_roots` that lets software TPMs count whose keys the reference file has.
SOFTWARE_TPM: Final = "software-tpm"


class Expectations(BaseModel):
    """What this host wants of a peer, beside its reference values."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    least_level: int = Field(default=1, ge=1, le=4)
    accepted_test_roots: list[str] = []

    def applied_to(self, reference: Reference) -> Reference:
        """A reference file may name test roots; only those that the settings accept too count."""
        accepted = {one.lower() for one in self.accepted_test_roots}
        tpm = reference.tpm
        if accepted and SOFTWARE_TPM not in accepted and tpm is not None:
            tpm = tpm.model_copy(update={"keys": [key for key in tpm.keys if key.root == "hardware"]})
        return reference.model_copy(
            update={
                "minimum_level": max(self.least_level, reference.minimum_level),
                "test_roots": [one for one in reference.test_roots if one.lower() in accepted],
                "tpm": tpm,
                "accept_test_roots": reference.accept_test_roots and bool(accepted),
            }
        )


class PeerRejected(AttestationRejected):
    """Refused by a verdict, which is kept for the receipt; `evidence` has the SHA-256 of each piece."""

    def __init__(self, code: str, detail: str, verdict: Verdict, evidence: Mapping[str, str]) -> None:
        super().__init__(code, detail)
        self.verdict, self.evidence = verdict, evidence


@dataclass(frozen=True)
class PeerJudge:
    """Appraises one peer, known by the name and the key of its certificate (SHA-256 of the SubjectPublicKeyInfo).

    `introduced` is what the peer showed when it was paired or enrolled; a reference file that names the peer goes before it.
    """

    name: str
    key_digest: str
    clock: Callable[[], datetime]
    expectations: Expectations
    reference: Reference = NO_REFERENCE
    collateral: Mapping[str, bytes] | None = None
    introduced: Reference | None = None

    def check_shown(self, evidence: Mapping[str, bytes], report_data: bytes) -> None:
        """Refuse at once what no log could mend: signatures, binding, host, roots. Raises AttestationRejected."""
        bare: dict[str, Any] = {"minimum_level": 0, "platform": None, "ima": None}
        reference = self._reference(report_data)
        if reference.tpm is not None:
            bare["tpm"] = reference.tpm.model_copy(update={"pcrs": None})
        verdict = self._verdict(evidence, reference.model_copy(update=bare))
        self._check_hardware(verdict, evidence)
        _accept(self.name, verdict, evidence)

    def appraise(self, evidence: Mapping[str, bytes], report_data: bytes) -> Verdict:
        """Everything together. Raises AttestationRejected."""
        verdict = self._verdict(evidence, self._reference(report_data))
        self._check_hardware(verdict, evidence)
        _accept(self.name, verdict, evidence)
        return verdict

    @property
    def _own(self) -> Reference | None:
        """What counts of the introduction."""
        named = self.reference.peers is not None and self.name in self.reference.peers
        return None if named else self.introduced

    def _check_hardware(self, verdict: Verdict, evidence: Mapping[str, bytes]) -> None:
        """A host that was introduced with its hardware shows that hardware again: another one, or none, is another host."""
        known = set(self._own.hosts or ()) if self._own is not None else set()
        shown = {name for one in verdict.appraisals for name in one.facts.get("host", [])}
        if known and not shown & known and not _is_unbound(verdict):
            said = ", ".join(sorted(shown))[:200] or "none"
            words = f"{self.name} was introduced with other hardware: {said}"
            raise PeerRejected("attest.hardware-changed", words, verdict, digests_of(evidence))

    def _reference(self, report_data: bytes) -> Reference:
        bound = {"user_data": report_data.hex(), "identity_key": self.key_digest}
        own = self._own
        reference = self.reference.for_peer(self.name) if own is None else self.reference.with_own(own)
        return self.expectations.applied_to(reference).model_copy(update=bound)

    def _verdict(self, evidence: Mapping[str, bytes], reference: Reference) -> Verdict:
        material = Material()
        try:
            for name, content in [*evidence.items(), *(self.collateral or {}).items()]:
                material.add(name, content)
            return appraise(material, reference, now=self.clock())
        except EvidenceError as error:
            raise AttestationRejected("attest.refused", f"{self.name}: {error.detail}") from error


def _is_unbound(verdict: Verdict) -> bool:
    """Evidence of another channel says nothing of the peer's hardware."""
    return any(reason.code in _CODES[0][1] for reason in verdict.reasons)


def digests_of(evidence: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each piece, by name."""
    return {name: hashlib.sha256(content).hexdigest() for name, content in sorted(evidence.items())}


def _accept(name: str, verdict: Verdict, evidence: Mapping[str, bytes]) -> None:
    """Raise PeerRejected with the code of the most telling reason, unless the verdict is an accepted one."""
    if verdict.accepted:
        return
    said = {reason.code for reason in verdict.reasons if reason.severity is Severity.REFUSAL}
    code = next((code for code, reasons in _CODES if said & reasons), "attest.refused" if said else "attest.level")
    sentences = verdict.why_not()
    more = f" (and {len(sentences) - _SHOWN} more)" if len(sentences) > _SHOWN else ""
    raise PeerRejected(code, f"{name}: {'; '.join(sentences[:_SHOWN])}{more}", verdict, digests_of(evidence))


def summarise(verdict: Verdict, evidence: Mapping[str, str]) -> dict[str, Any]:
    """The verdict as agents, receipts and reports carry it: bounded, with the roots named and the evidence's digests."""
    reasons: list[dict[str, str]] = [one.as_dict() for one in verdict.reasons[:64]]
    return {
        "accepted": verdict.accepted,
        "level": int(verdict.level),
        "level_words": verdict.level.words,
        "production_level": int(verdict.production_level),
        "wanted_level": int(verdict.wanted),
        "reasons": [{**one, "sentence": one["sentence"][:300]} for one in reasons],
        "identities": sorted({name for one in verdict.appraisals for name in one.facts.get("host", [])}),
        "evidence": [
            {"kind": one.kind, "root": one.root, "level": int(one.level), "production": one.production}
            for one in verdict.appraisals
        ],
        "digests": [{"kind": kind, "sha256": digest} for kind, digest in evidence.items()],
    }
