"""What an appraisal says: reasons, a trust vector, a level; `why_not()` is empty exactly where the evidence is accepted.

every reason --> refusal?   yes: level 0
                 weakness?  level = min(level, its bound)
level < the level that the relying party wants --> every weakness says why
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sealane.attest.reasons import (
    AFFIRMING,
    NO_CLAIM,
    REASONS,
    TEST_ROOT_CODES,
    Claim,
    Level,
    Severity,
)
from sealane.errors import printable

# Beyond any sentence of ours with what it may quote.
_SENTENCE_MAX = 4096


@dataclass(frozen=True)
class Reason:
    """One finding. `about` names the evidence; severity and clause are the catalogue's."""

    code: str
    about: str
    sentence: str

    @property
    def severity(self) -> Severity:
        """What it does to the verdict."""
        return REASONS[self.code].severity

    @property
    def clause(self) -> str:
        """The clause of the specification that the check stands on."""
        return REASONS[self.code].clause

    def as_dict(self) -> dict[str, str]:
        """For JSON and for logs."""
        return {
            "code": self.code,
            "severity": self.severity.value,
            "about": self.about,
            "sentence": self.sentence,
            "clause": self.clause,
        }


@dataclass
class Findings:
    """Collects the reasons, facts and affirmed claims of one piece of evidence while it is appraised."""

    about: str
    reasons: list[Reason] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    affirmed: set[Claim] = field(default_factory=set)
    root: str = ""

    def add(self, code: str, sentence: str) -> None:
        """Record a reason; a code that the catalogue lacks is our own fault (KeyError).

        The sentence may quote what the evidence says, a file's name in a log: it is made fit for a terminal.
        """
        REASONS[code]
        reason = Reason(code, self.about, printable(sentence, _SENTENCE_MAX))
        if reason not in self.reasons:
            self.reasons.append(reason)

    def has(self, *codes: str) -> bool:
        """Whether one of the codes was recorded."""
        return any(reason.code in codes for reason in self.reasons)

    @property
    def refused(self) -> bool:
        """Whether something refuses already."""
        return any(reason.severity is Severity.REFUSAL for reason in self.reasons)

    def affirm(self, *claims: Claim) -> None:
        """A claim for which a check passed."""
        self.affirmed.update(claims)


@dataclass(frozen=True)
class Appraisal:
    """The outcome for one piece of evidence. `root` is what it rests on; `ceiling` what such a root can carry at most."""

    about: str
    kind: str
    root: str
    ceiling: Level
    reasons: tuple[Reason, ...]
    affirmed: frozenset[Claim]
    facts: Mapping[str, Any]

    @property
    def refused(self) -> bool:
        """Whether a reason refuses it."""
        return any(reason.severity is Severity.REFUSAL for reason in self.reasons)

    @property
    def level(self) -> Level:
        """The ceiling, bounded by every weakness; 0 with a refusal."""
        return min([self.ceiling, *(REASONS[reason.code].bound for reason in self.reasons)])

    @property
    def production(self) -> bool:
        """Whether it rests on a vendor's root, and nothing refuses it."""
        return not self.refused and not any(reason.code in TEST_ROOT_CODES for reason in self.reasons)

    @property
    def vector(self) -> dict[str, int]:
        """The trustworthiness vector (draft-ietf-rats-ar4si, 2.3): the worst value that a reason gives a claim."""
        values = {claim: AFFIRMING if claim in self.affirmed else NO_CLAIM for claim in Claim}
        for reason in self.reasons:
            rule = REASONS[reason.code]
            if rule.claim is not None:
                values[rule.claim] = max(values[rule.claim], rule.value)
        return {claim.value: value for claim, value in values.items()}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "about": self.about,
            "kind": self.kind,
            "root": self.root,
            "production": self.production,
            "level": int(self.level),
            "vector": self.vector,
            "facts": dict(self.facts),
        }


def conclude(findings: Findings, *, kind: str, ceiling: Level) -> Appraisal:
    """The findings as an appraisal."""
    return Appraisal(
        findings.about,
        kind,
        findings.root,
        ceiling,
        tuple(findings.reasons),
        frozenset(findings.affirmed),
        dict(findings.facts),
    )


@dataclass(frozen=True)
class Verdict:
    """What all the evidence of one host says together."""

    appraisals: tuple[Appraisal, ...]
    wanted: Level = Level.IDENTITY

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """All reasons, refusals first."""
        order = list(Severity)
        every = [reason for appraisal in self.appraisals for reason in appraisal.reasons]
        return tuple(sorted(every, key=lambda reason: order.index(reason.severity)))

    @property
    def refused(self) -> bool:
        """Whether a reason refuses some of it: one bad piece of evidence is enough. No evidence is refused too."""
        return not self.appraisals or any(one.refused for one in self.appraisals)

    @property
    def level(self) -> Level:
        """The best level that a piece of evidence carries, 0 when one is refused."""
        return Level.NOTHING if self.refused else max(one.level for one in self.appraisals)

    @property
    def production_level(self) -> Level:
        """The best level that rests on a vendor's root: what a production policy may count on."""
        if self.refused:
            return Level.NOTHING
        return max((one.level for one in self.appraisals if one.production), default=Level.NOTHING)

    @property
    def accepted(self) -> bool:
        """Whether `why_not()` is empty."""
        return not self.why_not()

    def why_not(self) -> list[str]:
        """Every sentence that stands against the evidence; empty means that it is accepted."""
        refusals = self._sentences(Severity.REFUSAL)
        if refusals:
            return refusals
        if not self.appraisals:
            return ["there is no evidence"]
        if self.level >= self.wanted:
            return []
        lacking = f"level {int(self.level)} is reached and {int(self.wanted)} is wanted"
        return [lacking, *self._sentences(Severity.WEAKNESS)]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, receipts and logs."""
        return {
            "accepted": self.accepted,
            "level": int(self.level),
            "level_words": self.level.words,
            "production_level": int(self.production_level),
            "wanted_level": int(self.wanted),
            "vector": combine(one.vector for one in self.appraisals),
            "why_not": self.why_not(),
            "reasons": [reason.as_dict() for reason in self.reasons],
            "evidence": [one.as_dict() for one in self.appraisals],
        }

    def _sentences(self, severity: Severity) -> list[str]:
        return [f"{one.about}: {one.sentence}" for one in self.reasons if one.severity is severity]


def combine(vectors: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Claim by claim the worst of what was said."""
    said: Sequence[Mapping[str, int]] = list(vectors)
    return {claim.value: max((one[claim.value] for one in said), default=NO_CLAIM) for claim in Claim}
