"""The policy's gate: passed at either end once the peer is known, and before anything is prepared or moved."""

import asyncio
import json
from typing import Any, Literal

from sealane.enclave.interface import PeerEstablished, PeerSeen
from sealane.errors import ControlError, InternalError, SealaneError, make_error
from sealane.host.callers import caller_called
from sealane.host.job import Job
from sealane.host.migration.context import LANE_CIPHER, MigrationContext
from sealane.host.migration.enclave_process import EnclaveProcess
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
    await _ask(job, context, met, trust, vm, direction)


async def _ask(
    job: Job,
    context: MigrationContext,
    met: PeerEstablished | PeerSeen,
    trust: PeerTrust,
    vm: VmDefinition,
    direction: Literal["send", "receive"],
) -> None:
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


class StandingGate:
    """During the copy: the policy is asked again each time the peer was attested anew. A no ends the migration.

    Also notes the verdict on a peer that was refused, for the receipt.
    """

    def __init__(
        self,
        job: Job,
        context: MigrationContext,
        enclave: EnclaveProcess,
        vm: VmDefinition,
        direction: Literal["send", "receive"],
    ) -> None:
        self._job, self._context, self._enclave, self._vm, self._direction = job, context, enclave, vm, direction
        self._asking: asyncio.Task[None] | None = None
        self._unasked: PeerSeen | None = None  # the newest that the policy was not asked about
        self._refusal: SealaneError | None = None
        enclave.on_peer_seen = self._seen

    async def settled(self) -> None:
        """Wait for answers that are still to come, before the VM is given up or taken over; raises a no."""
        while self._asking is not None:
            await asyncio.wait({self._asking})
        if self._refusal is not None:
            raise self._refusal

    def _seen(self, seen: PeerSeen) -> None:
        self._job.update(**facts_of(seen))  # a verdict that refuses stands in the receipt
        if not seen.accepted:
            return
        self._unasked = seen
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_about_the_newest(), name=f"policy {self._job.id[:8]}")

    async def _ask_about_the_newest(self) -> None:
        """One question at a time: the peer at the source may begin rounds faster than a policy answers."""
        try:
            while (seen := self._unasked) is not None:
                self._unasked = None
                await self._ask_again(seen)
        finally:
            self._asking = None

    async def _ask_again(self, seen: PeerSeen) -> None:
        try:
            trust = trust_of(seen)
            note_sighting(self._job, self._context, seen.peer_fingerprint, trust)
            await _ask(self._job, self._context, seen, trust, self._vm, self._direction)
        except SealaneError as error:
            self._refuse(error)
        except Exception as error:  # whatever it is, it is no yes
            self._refuse(InternalError("internal.error", f"the policy was not asked: {type(error).__name__}"))

    def _refuse(self, error: SealaneError) -> None:
        self._refusal = error
        self._enclave.fail(error)  # whoever waits for it ends the migration


def facts_of(met: PeerEstablished | PeerSeen) -> dict[str, Any]:
    """What the migration's snapshot says of the channel and of who is at its other end."""
    facts: dict[str, Any] = {
        "tls_version": met.tls_version,
        "kex_group": met.kex_group,
        "cipher": LANE_CIPHER,
        "peer_fingerprint": met.peer_fingerprint,
    }
    return {**facts, "peer_trust": trust_of(met)} if met.verdict else facts


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


def trust_of(met: PeerEstablished | PeerSeen) -> PeerTrust:
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
