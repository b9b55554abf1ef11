"""The CA's host answers: enrols who came with a code, and grants certificates to who shows good evidence.

A connection proves itself by TLS within a time; few are served at once. Whoever was revoked is told so, and gets the list.
"""

import asyncio
import base64
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

import structlog

from sealane.attest.asking import PolicyWanted
from sealane.attest.known import KnownHost, KnownHosts
from sealane.attest.verdict import Verdict
from sealane.crypto.authority import Authority
from sealane.crypto.identity import Identity
from sealane.crypto.signatures import parse_public_key
from sealane.enclave.quoting import make_judge_maker
from sealane.errors import HostError, PeerError, SealaneError, for_peer
from sealane.host.config import Settings
from sealane.host.fleet.evidence import ask_quoting
from sealane.host.fleet.registry import FleetHost, Registry
from sealane.host.fleet.wire import Wire
from sealane.host.models import Peer
from sealane.host.proving import known_host_of
from sealane.host.quoting import QuotingService
from sealane.session.pairing import Offer
from sealane.session.renewal import Asked, Grant, Renewal, Shown
from sealane.session.vouching import Claims

# A quote of a slow TPM and the way there and back; and how many hosts are served at once.
SERVE_TIMEOUT_S: Final = 60.0
SERVED_MAX: Final = 16


class OfficeContext(Protocol):
    """The agent, as the CA's office sees it."""

    identity: Identity
    settings: Settings
    quoting: QuotingService


@dataclass(frozen=True)
class Appraisal:
    """A verdict as it goes into a certificate."""

    verdict: Verdict

    @property
    def claims(self) -> Claims:
        """Level 1 without evidence of hardware is a key that was enrolled, and production counts it so."""
        found = self.verdict.appraisals
        return Claims(
            level=max(1, int(self.verdict.level)),
            production_level=max(1, int(self.verdict.production_level)),
            root=", ".join(sorted({one.root for one in found if one.root}))[:200],
            hardware=sorted({str(name) for one in found for name in one.facts.get("host", [])})[:8],
        )


class Office:
    """The CA's side; harmless on a host that has no CA."""

    def __init__(self, context: OfficeContext, registry: Registry, clock: Callable[[], datetime]) -> None:
        self._context, self.registry, self._clock = context, registry, clock
        self._log = structlog.get_logger().bind(part="ca")
        self._tasks: set[asyncio.Task[None]] = set()

    def welcome(self, connection: socket.socket) -> None:
        """A connection whose preface asked for a renewal; closed at once where there is no CA, or no room."""
        if not self.registry.is_there or len(self._tasks) >= SERVED_MAX:
            connection.close()
            return
        task = asyncio.create_task(self._serve(connection), name="renewal")
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._served(connection, done))

    async def stop(self) -> None:
        """End what is served."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _served(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        connection.close()
        if not task.cancelled() and (error := task.exception()):
            self._log.error("unexpected error", exc_info=error)

    async def _serve(self, connection: socket.socket) -> None:
        enrolled = {host.fingerprint: host for host in self.registry.hosts()}
        renewal = Renewal(self._context.identity, peers=frozenset(enrolled), now=self._clock())
        wire = Wire(connection, renewal)
        try:
            async with asyncio.timeout(SERVE_TIMEOUT_S):
                asked = await wire.expect(Asked)
                host = enrolled[asked.fingerprint]
                await self._answer(wire, renewal, asked, host, connection)
        except SealaneError as error:
            self._log.warning("no certificate was given", code=error.code, detail=error.detail)
            await wire.refuse(for_peer(error))
        except (OSError, TimeoutError) as error:
            self._log.info("a renewal broke off", reason=str(error) or "too slow")

    async def _answer(
        self, wire: Wire, renewal: Renewal, asked: Asked, host: FleetHost, connection: socket.socket
    ) -> None:
        if host.state != "approved":
            raise PeerError("ca.revoked", f"the CA has revoked {host.name}")
        authority = await asyncio.to_thread(self.open)
        pem = b""
        if asked.ask.want == "certificate":
            renewal.challenge()
            shown = await wire.expect(Shown)
            line = self._context.quoting.connect_agent()
            claims = (await asyncio.to_thread(self.appraise, host, shown, line)).claims
            pem = self.issue(authority, host, claims)
            address = str(connection.getpeername()[0]).removeprefix("::ffff:")
            self.registry.note_address(host.name, address, asked.ask.port)
        renewal.grant(self.news(authority).model_copy(update={"certificate": pem.decode()}))
        await wire.flush()

    # What signs; all of it blocks for moments

    def open(self) -> Authority:
        """The CA; raises `ca.none`, `ca.locked`."""
        return self.registry.open(read_passphrase(self._context.settings.authority.passphrase_file))

    def issue(self, authority: Authority, host: FleetHost, claims: Claims) -> bytes:
        """A host certificate (PEM)."""
        hours = self._context.settings.authority.certificate_hours
        pem = self.registry.issue(authority, host, claims, now=self._clock(), lifetime=timedelta(hours=hours))
        self._log.info("host certificate", to=host.name, level=claims.level, hours=hours)
        return pem

    def news(self, authority: Authority) -> Grant:
        """The list as it is now, and the fleet's approved hosts."""
        lifetime = timedelta(hours=self._context.settings.authority.list_hours)
        listed = self.registry.revocations(authority, now=self._clock(), lifetime=lifetime)
        hosts = [host.entry for host in self.registry.hosts() if host.state == "approved"]
        return Grant(revocations=listed.decode(), hosts=hosts)

    def appraise(self, host: FleetHost, shown: Shown, line: socket.socket) -> Appraisal:
        """The host's evidence against this host's reference values and what the host showed when it was enrolled.

        Raises AttestationRejected, HostError.
        """
        policy = ask_quoting(line, PolicyWanted())
        introduced = KnownHosts(
            fleet={host.name: KnownHost(reference=host.reference, hardware_keys=list(host.hardware_keys))}
            if host.reference
            else {}
        )
        policy["known"] = introduced.model_dump_json().encode()
        judge = make_judge_maker(policy, self._clock)(host.name, parse_public_key(shown.public_key).digest)
        return Appraisal(judge.appraise(shown.pieces, shown.user_data))

    # Enrolment by a code

    def endorsement(self) -> dict[str, str]:
        """What a host that joins is shown; raises `ca.none`, `ca.locked`."""
        self.open()
        return {"authority": base64.b64encode(self.registry.certificate_pem).decode()}

    def check(self, offer: Offer) -> None:
        """Raise what speaks against a host that comes with the code: PeerError `peer.message`, `pairing.tpm`."""
        self._known_host_of(offer)

    def _known_host_of(self, offer: Offer) -> KnownHost | None:
        return known_host_of(offer, self._context.settings.attestation.tpm_roots, self._clock())

    def enrol(self, offer: Offer, address: str, port: int) -> Peer:
        """The host that came with the code is approved; raises `trust.exists`, PeerError `peer.message`."""
        certificate, shown = offer.certificate, self._known_host_of(offer)
        host = FleetHost(
            name=certificate.name,
            fingerprint=certificate.fingerprint,
            public_key=certificate.public_key,
            state="approved",
            address=address,
            port=port,
            reference="" if shown is None else shown.reference,
            hardware_keys=() if shown is None else tuple(shown.hardware_keys),
        )
        self.registry.enrol(host, now=self._clock())
        return Peer(name=host.name, fingerprint=host.fingerprint, address=address, port=port)


def read_passphrase(path: str) -> bytes | None:
    """The first line of the file; None without a path. Raises `ca.locked`."""
    if not path:
        return None
    try:
        return Path(path).read_bytes().partition(b"\n")[0]
    except OSError as error:
        raise HostError("ca.locked", f"{path}: {error.strerror}") from error
