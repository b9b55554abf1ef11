"""A host that belongs to a fleet: joins by a code, has its certificate renewed, and asks for news in between."""

import asyncio
import base64
import binascii
import contextlib
import json
from collections.abc import Callable
from datetime import datetime
from typing import Final, Literal, Protocol

import structlog

from sealane.attest.asking import EvidenceAsked
from sealane.crypto.identity import Identity
from sealane.crypto.pake import Side
from sealane.errors import PeerError, SealaneError, for_peer, make_error
from sealane.host.config import Settings
from sealane.host.fleet.evidence import ask_quoting
from sealane.host.fleet.known import KnownHostsFile
from sealane.host.fleet.membership import Member, Membership
from sealane.host.fleet.office import Office
from sealane.host.fleet.wire import Wire
from sealane.host.migration.dialling import dial_peer
from sealane.host.models import FleetStatus, Peer, Problem
from sealane.host.problems import problem_of
from sealane.host.quoting import QuotingService
from sealane.limits import DEFAULT_PORT
from sealane.paths import Paths
from sealane.session.pairing import Offer
from sealane.session.preface import LABEL_BYTES, ConnectionKind, Preface, encode_preface
from sealane.session.renewal import Ask, EvidenceWanted, Granted, Renewal

_LOOK_EVERY_S: Final = 5.0
_RENEW_TIMEOUT_S: Final = 60.0
# After a renewal that failed, however short a certificate lives.
_RETRY_S: Final = 30.0
_REFERENCE_FILE: Final = "reference-values.json"
_KEYS_FILE: Final = "tpm-keys.json"


class RenewingContext(Protocol):
    """The agent, as a fleet's host sees it."""

    paths: Paths
    identity: Identity
    settings: Settings
    quoting: QuotingService

    @property
    def port(self) -> int:
        """Where this agent listens."""

    def binaries(self) -> list[str]:
        """QEMU's binaries that may receive a VM here."""


class FleetHostSide:
    """The host's side."""

    def __init__(self, context: RenewingContext, membership: Membership, clock: Callable[[], datetime]) -> None:
        self._context, self._membership, self._clock = context, membership, clock
        self._log = structlog.get_logger().bind(part="fleet")
        self._problem: Problem | None = None
        self._asked_at: datetime | None = None
        self._busy = asyncio.Lock()

    async def keep(self) -> None:
        """For the agent's life: renew in time, ask for news, and try again where that fails."""
        while True:
            with contextlib.suppress(SealaneError):
                await self._look()
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look(self) -> None:
        member = self._membership.member
        if member is None or member.address is None:
            return
        since = None if self._asked_at is None else (self._clock() - self._asked_at).total_seconds()
        if self._membership.due(self._clock()):
            if since is None or since >= _RETRY_S or self._problem is None:
                await self.renew("certificate")
        elif since is None or since >= self._context.settings.authority.news_every_s:
            await self.renew("news")

    async def renew(self, want: Literal["certificate", "news"]) -> None:
        """Ask the CA's host now; raises `ca.*`, `peer.*`, `attest.*`, `quoting.*`. What fails stands in the status too."""
        async with self._busy:
            self._asked_at = self._clock()
            try:
                await self._renew(want)
            except SealaneError as error:
                self._problem = problem_of(error)
                self._log.warning("the CA gave nothing", want=want, code=error.code, detail=error.detail)
                raise
            self._problem = None

    async def _renew(self, want: Literal["certificate", "news"]) -> None:
        member = self._membership.member
        if member is None or member.address is None:
            raise make_error("ca.none", "this host belongs to no CA that can be asked")
        connection = await dial_peer(member.address, member.port or DEFAULT_PORT)
        ask = Ask(want=want, port=self._context.port)
        fingerprints = frozenset({member.fingerprint})
        renewal = Renewal(self._context.identity, peers=fingerprints, now=self._clock(), ask=ask)
        wire = Wire(connection, renewal)
        try:
            async with asyncio.timeout(_RENEW_TIMEOUT_S):
                preface = encode_preface(Preface(ConnectionKind.RENEWAL, bytes(LABEL_BYTES)))
                await asyncio.get_running_loop().sock_sendall(connection, preface)
                if want == "certificate":
                    wanted = await wire.expect(EvidenceWanted)
                    line = self._context.quoting.connect_agent(self._context.binaries())
                    pieces = await asyncio.to_thread(ask_quoting, line, EvidenceAsked(wanted.user_data, ""))
                    renewal.evidence_made(pieces)
                granted = await wire.expect(Granted)
            self._membership.take(granted.grant, self._clock())
            self._log.info("the CA answered", want=want)
        except SealaneError as error:
            await wire.refuse(for_peer(error))
            raise
        except TimeoutError:
            raise PeerError("peer.slow", f"no answer from the CA's host at {member.address}") from None
        except OSError as error:
            raise PeerError("peer.closed", f"the CA's host at {member.address}: {error.strerror or error}") from error
        finally:
            connection.close()

    def status(self) -> FleetStatus:
        """How this host stands; raises `ca.none`."""
        standing = self._membership.standing()
        member, claims, revocations = standing.member, standing.claims, standing.revocations
        return FleetStatus(
            authority=standing.authority.name,
            authority_fingerprint=standing.authority_fingerprint,
            authority_host=member.authority_host,
            address=member.address,
            port=member.port,
            certificate_until=standing.certificate.not_after if standing.certificate else None,
            level=claims.level if claims else None,
            production_level=claims.production_level if claims else None,
            list_number=revocations.number if revocations else None,
            list_until=revocations.next_update if revocations else None,
            revoked=len(revocations.serials) if revocations else 0,
            hosts=[host.name for host in standing.hosts],
            problem=self._problem,
        )


class EnrolmentTerms:
    """What a code that was shown by `sealane ca invite` leads to."""

    def __init__(self, context: RenewingContext, office: Office, membership: Membership) -> None:
        self._context, self._office, self._membership = context, office, membership

    def endorsements(self, side: Side) -> dict[str, str]:
        """The CA shows its certificate, the host its reference values. Raises `ca.none`, `ca.locked`, `ca.exists`."""
        if side == "inviter":
            return self._office.endorsement()
        return shown_reference(self._context.paths, self._context.settings)

    def check(self, side: Side, offer: Offer) -> None:
        """The joiner looks whether it may belong to this CA, the CA at what the host shows of itself."""
        if side == "joiner":
            self._membership.check(_authority_of(offer))
        else:
            self._office.check(offer)

    def conclude(self, side: Side, offer: Offer, address: str, port: int) -> Peer:
        """The CA enrols the host; the host keeps the CA's certificate and where its host is."""
        if side == "inviter":
            return self._office.enrol(offer, address, port)
        certificate = offer.certificate
        member = Member(
            authority_host=certificate.name, fingerprint=certificate.fingerprint, address=address, port=port
        )
        self._membership.join(member, _authority_of(offer))
        return Peer(name=certificate.name, fingerprint=certificate.fingerprint, address=address, port=port)


def shown_reference(paths: Paths, settings: Settings) -> dict[str, str]:
    """What this host shows of its hardware: keys and its own values where it has a TPM, else nothing.

    Raises `quoting.slow` while it still measures.
    """
    if "tpm2" not in settings.attestation.drivers:
        return {}
    try:
        text = (paths.run / _REFERENCE_FILE).read_bytes()
        hosts = json.loads(text).get("hosts")
        keys = json.loads((paths.run / _KEYS_FILE).read_bytes())
    except FileNotFoundError:
        raise make_error("quoting.slow", "this host has not measured itself yet") from None
    except (OSError, ValueError) as error:
        raise make_error("quoting.failed", f"{_REFERENCE_FILE} cannot be read: {type(error).__name__}") from error
    return {"reference": base64.b64encode(text).decode(), **keys} if hosts else {}


def _authority_of(offer: Offer) -> bytes:
    try:
        return base64.b64decode(offer.endorsements["authority"], validate=True)
    except (KeyError, binascii.Error, ValueError):
        raise PeerError("peer.message", "the other end shows no CA's certificate") from None


class KnownFleet:
    """Keeps `known-hosts.json` as the fleet changes."""

    def __init__(self, membership: Membership, known: KnownHostsFile) -> None:
        self._membership, self._known = membership, known

    def refresh(self) -> None:
        """After each change of the fleet."""
        self._known.note_fleet(self._membership.hosts())
