"""The policy's gate: passed at either end once the peer is known, and before anything is prepared or moved."""

import asyncio
import json
from typing import Any, Literal

from sealane.enclave.interface import PeerEstablished
from sealane.errors import ControlError, SealaneError, make_error
from sealane.host.callers import caller_called
from sealane.host.jobs import Job
from sealane.host.migration.context import MigrationContext
from sealane.host.models import Evidence, PeerTrust, PolicyDecision, VmDefinition
from sealane.host.policy import Move, load_policy
from sealane.host.store import utc_now


async def pass_gate(
    job: Job, context: MigrationContext, met: PeerEstablished, vm: VmDefinition, direction: Literal["send", "receive"]
) -> None:
    """Ask the policy, note its answer in the migration and the log; raises what it answers where that is a no.

    `policy.denied`, `policy.level-too-low`, `policy.broken`.
    """
    trust = trust_of(met)
    job.update(peer_trust=trust)
    note_sighting(job, context, met.peer_fingerprint, trust)
    migration, config = job.migration, context.paths.config
    allowed_here = context.settings.allowed_protections

    def decide() -> PolicyDecision:
        caller = caller_called(migration.requested_by)
        move = Move(
            direction, vm, met.peer_name, met.peer_fingerprint, trust, migration.protection, caller, allowed_here
        )
        return load_policy(config).decide(move)

    decision = await asyncio.to_thread(decide)  # files and the user database: another VM may be paused meanwhile
    job.update(policy=decision)
    job.log.info("policy", decision=decision.decision, words=decision.words, digest=decision.digest)
    if decision.decision != "allow":
        raise refusal(decision)


def refusal(decision: PolicyDecision) -> SealaneError:
    """The decision as an error."""
    if decision.code is None:
        return ControlError("policy.denied", decision.words)
    return make_error(decision.code, decision.words)


def note_sighting(job: Job, context: MigrationContext, fingerprint: str, trust: PeerTrust) -> None:
    """Keep what was seen for `sealane hosts`; a journal that is full does not decide about a move."""
    try:
        context.store.note_sighting(fingerprint, trust)
    except SealaneError as error:
        job.log.warning("what was seen of the peer was not kept", code=error.code)


def trust_of(met: PeerEstablished) -> PeerTrust:
    """How far the peer is trusted, by its verdict (`sealane.attest.peer.summarise`)."""
    verdict: dict[str, Any] = json.loads(met.verdict)
    return PeerTrust(
        level=verdict["level"],
        # the certificate is pinned whatever the evidence rests on
        production_level=max(1, verdict["production_level"]) if verdict["level"] else 0,
        root=", ".join(sorted({str(each["root"]) for each in verdict["evidence"] if each["root"]})) or "unknown",
        identities=[str(each) for each in verdict.get("identities", [])],
        evidence=[Evidence(kind=str(each["kind"]), sha256=str(each["sha256"])) for each in verdict.get("digests", [])],
        reasons=[str(each["sentence"]) for each in verdict["reasons"]],
        seen_at=utc_now(),
        vouched_by=met.vouched_by or None,
    )
