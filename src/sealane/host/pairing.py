"""Pairing at the agent: shows one code at a time, answers those who try it, or tries another host's.

A code lasts PAIRING_LIFETIME_S and one pairing. Each connection may prove one guess, three wrong ones end the code, and
connections that prove nothing are bounded in number and in time, so that guessing costs a new `sealane pair` each three.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol, TypeVar

import structlog

from sealane.attest.known import KnownHost
from sealane.crypto.dsse import parse_certificate
from sealane.crypto.identity import Identity
from sealane.crypto.pake import Side
from sealane.errors import PeerError, SealaneError, make_error
from sealane.host.config import Settings
from sealane.host.migration.dialling import dial_peer
from sealane.host.models import PairingStatus, Peer
from sealane.host.peers import Peers
from sealane.host.problems import problem_of
from sealane.host.proving import Proving, check_secret, known_host_of
from sealane.limits import (
    PAIRING_ANSWER_TIMEOUT_S,
    PAIRING_CONNECTIONS_MAX,
    PAIRING_LIFETIME_S,
    PAIRING_TRIES,
)
from sealane.session.pairing import (
    Answered,
    Challenged,
    Done,
    Event,
    Offer,
    OfferReceived,
    Pairing,
    Purpose,
    make_code,
    normal_code,
)
from sealane.session.preface import LABEL_BYTES, ConnectionKind, Preface, encode_preface

T = TypeVar("T", bound=Event)
_READ_BYTES: Final = 4096


class PairingContext(Protocol):
    """The agent, as pairing sees it."""

    identity: Identity
    settings: Settings
    peers: Peers

    @property
    def port(self) -> int:
        """Where this agent listens."""


class Terms(Protocol):
    """What becomes of a pairing: two hosts that trust each other, or a host that a CA has enrolled."""

    def endorsements(self, side: Side) -> dict[str, str]:
        """What this host shows beside its certificate, by name, in base64; raises SealaneError."""

    def check(self, side: Side, offer: Offer) -> None:
        """Raise what would speak against the other end; change nothing."""

    def conclude(self, side: Side, offer: Offer, address: str, port: int) -> Peer:
        """Both ends agree: keep it. `side` is this host's."""


class PeerTerms:
    """Each host trusts the other by its fingerprint, and keeps what it showed of its hardware and its software."""

    def __init__(
        self,
        context: PairingContext,
        show: Callable[[], dict[str, str]] = dict,
        keep: Callable[[str, KnownHost | None], None] = lambda name, shown: None,
    ) -> None:
        """`show` gives what this host shows, `keep` takes what the other one has shown."""
        self._context, self._show, self._keep = context, show, keep

    def endorsements(self, side: Side) -> dict[str, str]:
        """Keys of the TPM and reference values, where this host has a TPM; raises `quoting.slow` while it still measures."""
        return self._show()

    def check(self, side: Side, offer: Offer) -> None:
        """Raises `trust.exists`, `peer.message`."""
        self._known_host_of(offer)
        self._context.peers.check(_peer_of(offer, None, None))

    def conclude(self, side: Side, offer: Offer, address: str, port: int) -> Peer:
        """Raises `trust.exists`, `peer.message`."""
        shown = self._known_host_of(offer)
        peer = self._context.peers.add(_peer_of(offer, address, port))
        self._keep(peer.name, shown)
        return peer

    def _known_host_of(self, offer: Offer) -> KnownHost | None:
        return known_host_of(offer, self._context.settings.attestation.tpm_roots, datetime.now(UTC))


class NoProving:
    """For a host that shows no TPM and asks for none."""

    async def challenge(self, offer: Offer) -> tuple[bytes, bytes]:
        """Nothing."""
        return b"", b""

    async def activate(self, credential: bytes) -> bytes:
        """Nothing."""
        return b""


@dataclass
class _Invitation:
    code: str
    purpose: Purpose
    expires: float
    expires_at: datetime
    wrong: int = 0
    trying: int = 0
    connections: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    over: PairingStatus | None = None


class PairingDesk:
    """This host's side of pairings, in both roles."""

    def __init__(
        self,
        context: PairingContext,
        clock: Callable[[], float] = time.monotonic,
        terms: Mapping[Purpose, Terms] | None = None,
        proving: Proving | None = None,
    ) -> None:
        self._context, self._clock, self._proving = context, clock, proving or NoProving()
        self._terms: Mapping[Purpose, Terms] = terms or {"pairing": PeerTerms(context)}
        self._log = structlog.get_logger().bind(part="pairing")
        self._invitation: _Invitation | None = None

    # The host that shows a code

    def invite(self, purpose: Purpose = "pairing") -> PairingStatus:
        """Show a new code for this purpose; an earlier one is void."""
        self._terms[purpose].endorsements("inviter")  # what is missing shows now, and not when somebody comes
        self.cancel()
        self._invitation = _Invitation(
            make_code(),
            purpose,
            self._clock() + PAIRING_LIFETIME_S,
            datetime.now(UTC) + timedelta(seconds=PAIRING_LIFETIME_S),
        )
        self._log.info("pairing opened", minutes=PAIRING_LIFETIME_S / 60)
        return self.status()

    def status(self) -> PairingStatus:
        """How the last invitation stands; raises `pairing.over` where there was none."""
        invitation = self._invitation
        if invitation is None:
            raise make_error("pairing.over", "no code was shown since the agent's start")
        self._expire(invitation)
        if invitation.over is not None:
            return invitation.over
        left = PAIRING_TRIES - invitation.wrong
        return PairingStatus(state="waiting", code=invitation.code, expires_at=invitation.expires_at, tries_left=left)

    def cancel(self) -> None:
        """Void the code that is shown, if one is."""
        if self._invitation is not None:
            self._end(self._invitation, make_error("pairing.over", "it was cancelled"))

    async def stop(self) -> None:
        """Void the code, and wait for those who are trying it."""
        self.cancel()
        if self._invitation is not None:
            await asyncio.gather(*self._invitation.tasks, return_exceptions=True)

    def welcome(self, connection: socket.socket) -> None:
        """A connection whose preface asked to pair; closed at once where no code is shown or too many try it."""
        invitation = self._invitation
        if invitation is not None:
            self._expire(invitation)
        if invitation is None or invitation.over is not None or not self._has_room(invitation):
            connection.close()
            return
        invitation.trying += 1
        task = asyncio.create_task(self._answer(invitation, connection), name="pairing")
        invitation.tasks.add(task)
        task.add_done_callback(lambda done: self._answered(invitation, connection, done))

    def _has_room(self, invitation: _Invitation) -> bool:
        """A guess that may still be proved counts as one of the tries, so that they cannot be outrun by many at once."""
        invitation.connections += 1
        if invitation.connections > PAIRING_CONNECTIONS_MAX:
            self._end(invitation, make_error("pairing.over", "too many connections came without a code"))
            return False
        return invitation.wrong + invitation.trying < PAIRING_TRIES

    async def _answer(self, invitation: _Invitation, connection: socket.socket) -> None:
        purpose, terms = invitation.purpose, self._terms[invitation.purpose]
        offer = self._own_offer(terms.endorsements("inviter"))
        pairing = Pairing("inviter", invitation.code, self._context.identity, offer, purpose=purpose)
        wire = _Wire(connection, pairing)
        try:
            async with asyncio.timeout(PAIRING_ANSWER_TIMEOUT_S):
                received = await wire.expect(OfferReceived)
                terms.check("inviter", received.offer)
                credential, secret = await self._proving.challenge(received.offer)
                pairing.challenge(credential)
                answered = await wire.expect(Answered)
                check_secret(secret, answered.secret)
                found = await self._proving.activate(answered.credential)
                if invitation.over is not None:  # another one was faster
                    raise make_error("pairing.over")
                address, *_ = connection.getpeername()
                peer = terms.conclude("inviter", received.offer, _plain(str(address)), received.offer.port)
                invitation.over = PairingStatus(state="paired", peer=peer, words=received.words)  # before anybody else
                self._log.info("paired", peer=peer.name, fingerprint=peer.fingerprint, words=received.words)
                pairing.accept(found)
                await wire.flush()
        except SealaneError as error:
            await wire.refuse(error)
            self._tried(invitation, error)
        except (OSError, TimeoutError) as error:
            self._log.info("a pairing attempt broke off", reason=str(error) or "too slow")

    def _tried(self, invitation: _Invitation, error: SealaneError) -> None:
        """A wrong code is counted, a peer that cannot be taken ends it, everything else may be noise."""
        self._log.warning("a pairing attempt failed", code=error.code, detail=error.detail)
        if error.code == "pairing.code":
            invitation.wrong += 1
            if invitation.wrong >= PAIRING_TRIES:
                self._end(invitation, make_error("pairing.over", f"{PAIRING_TRIES} wrong codes were tried"))
        elif error.code in {"trust.exists", "pairing.mismatch", "pairing.tpm", "ca.exists"}:
            self._end(invitation, error)

    def _answered(self, invitation: _Invitation, connection: socket.socket, task: asyncio.Task[None]) -> None:
        invitation.trying -= 1
        invitation.tasks.discard(task)
        connection.close()
        if not task.cancelled() and (error := task.exception()):
            self._log.error("unexpected error", exc_info=error)

    def _expire(self, invitation: _Invitation) -> None:
        if self._clock() >= invitation.expires:
            self._end(invitation, make_error("pairing.over", "nobody came in time"))

    def _end(self, invitation: _Invitation, error: SealaneError) -> None:
        if invitation.over is None:
            invitation.over = PairingStatus(state="failed", problem=problem_of(error))
            for task in invitation.tasks - {asyncio.current_task()}:
                task.cancel()

    # The host that is given the code

    async def join(self, address: str, port: int, typed: str, purpose: Purpose = "pairing") -> PairingStatus:
        """Pair with the agent there; raises `usage.argument`, `peer.unreachable`, `pairing.*`, `trust.exists`."""
        code = normal_code(typed)
        connection = await dial_peer(address, port)
        terms = self._terms[purpose]
        try:
            offer = self._own_offer(terms.endorsements("joiner"))
        except BaseException:
            connection.close()
            raise
        pairing = Pairing("joiner", code, self._context.identity, offer, purpose=purpose)
        wire = _Wire(connection, pairing)
        try:
            async with asyncio.timeout(PAIRING_ANSWER_TIMEOUT_S):
                preface = encode_preface(Preface(ConnectionKind.PAIRING, bytes(LABEL_BYTES)))
                await asyncio.get_running_loop().sock_sendall(connection, preface)
                received = await wire.expect(OfferReceived)
                terms.check("joiner", received.offer)
                pairing.accept()
                challenged = await wire.expect(Challenged)
                found = await self._proving.activate(challenged.credential)
                credential, secret = await self._proving.challenge(received.offer)
                pairing.answer(found, credential)
                check_secret(secret, (await wire.expect(Done)).secret)
                peer = terms.conclude("joiner", received.offer, _plain(address), port)
        except SealaneError as error:
            await wire.refuse(error)
            raise
        except TimeoutError:
            raise PeerError("peer.slow", f"no answer from {address} port {port}") from None
        except OSError as error:
            raise PeerError("pairing.closed", f"{address} port {port}: {error.strerror or error}") from error
        finally:
            connection.close()
        self._log.info("paired", peer=peer.name, fingerprint=peer.fingerprint, words=received.words)
        return PairingStatus(state="paired", peer=peer, words=received.words)

    # Both

    def _own_offer(self, endorsements: dict[str, str]) -> Offer:
        return Offer(parse_certificate(self._context.identity.certificate_pem), self._context.port, endorsements)


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


def _peer_of(offer: Offer, address: str | None, port: int | None) -> Peer:
    return Peer(name=offer.certificate.name, fingerprint=offer.certificate.fingerprint, address=address, port=port)


class _Wire:
    """One connection and the state machine that it feeds."""

    def __init__(self, connection: socket.socket, pairing: Pairing) -> None:
        self._connection, self._pairing = connection, pairing
        self._events: list[Event] = []

    async def expect(self, kind: type[T]) -> T:
        """The next event of this kind; raises what the machine raises, or `pairing.closed`."""
        loop = asyncio.get_running_loop()
        while True:
            for event in self._events:
                if isinstance(event, kind):
                    self._events.remove(event)
                    return event
            await self.flush()
            data = await loop.sock_recv(self._connection, _READ_BYTES)
            if not data:
                raise PeerError("pairing.closed")
            self._events += self._pairing.receive(data)

    async def flush(self) -> None:
        """Send what waits."""
        if data := self._pairing.bytes_to_send():
            await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def refuse(self, error: SealaneError) -> None:
        """Tell the other end why, if it still listens."""
        if error.code in {"pairing.closed", "peer.slow"}:
            return
        self._pairing.refuse(error)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self.flush()
