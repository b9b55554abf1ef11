"""What a host keeps of the fleet that it belongs to, and what its enclaves are told of it.

state/fleet/member.json       where the CA's host is, and which certificate it has
state/fleet/authority.crt     the CA's certificate, as it came when this host joined
state/fleet/revocations.pem   its last revocation list
state/fleet/host.crt          what the CA issued for this host last
state/fleet/hosts.json        the fleet's hosts: names, addresses, reference values
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final, TypedDict

from pydantic import Field, TypeAdapter, ValidationError

from sealane.crypto.authority import CLAIMS
from sealane.crypto.chains import Certificate, RevocationList, parse_certificates, parse_revocation_list
from sealane.crypto.identity import Identity, fingerprint, public_key
from sealane.errors import HostError, PeerError, make_error
from sealane.host.config import Settings
from sealane.host.fleet.files import read_if_there, write_whole
from sealane.host.models import Fingerprint, Model, Peer
from sealane.paths import Paths
from sealane.session.renewal import Grant, HostEntry
from sealane.session.vouching import NO_VOUCHERS, Claims, Notary, TrustedAuthority, Vouchers, check_newer

_HOSTS: Final = TypeAdapter(list[HostEntry])
# A host certificate is renewed when so much of its time is over; what is left is for a CA's host that is down.
RENEW_AT: Final = 2 / 3


class Member(Model):
    """Where the CA's host is; without an address the host belongs to a CA by files alone."""

    authority_host: str
    fingerprint: Fingerprint
    address: str | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None


class Introduction(TypedDict):
    """Fields of an enclave's `Begin`."""

    vouchers: str
    host_certificate: str


@dataclass(frozen=True)
class Standing:
    """How this host stands with its CA, for `sealane ca status`."""

    member: Member
    authority: Certificate
    authority_fingerprint: str
    certificate: Certificate | None
    claims: Claims | None
    revocations: RevocationList | None
    hosts: list[HostEntry]


class Membership:
    """The files, read anew each time: the command line may change them. Raises HostError where they cannot be read."""

    def __init__(self, paths: Paths, settings: Settings, identity: Identity) -> None:
        self._directory, self._settings, self._identity = paths.membership, settings, identity
        self.on_change: Callable[[], None] = lambda: None

    # What is there

    @property
    def member(self) -> Member | None:
        """None where this host belongs to no fleet."""
        content = read_if_there(self._directory / "member.json")
        try:
            return Member.model_validate_json(content) if content else None
        except ValidationError as error:
            raise HostError("host.store", f"{self._directory}: member.json does not fit") from error

    @property
    def authority_pem(self) -> bytes:
        """The CA's certificate; raises `ca.none`."""
        pem = read_if_there(self._directory / "authority.crt")
        if not pem:
            raise make_error("ca.none", "this host belongs to no CA; see `sealane ca join`")
        return pem

    def hosts(self) -> list[HostEntry]:
        """The fleet's hosts without this one, by name."""
        content = read_if_there(self._directory / "hosts.json")
        try:
            found = _HOSTS.validate_json(content) if content else []
        except ValidationError as error:
            raise HostError("host.store", f"{self._directory}: hosts.json does not fit") from error
        return [entry for entry in found if entry.fingerprint != self._identity.fingerprint]

    def peers(self) -> list[Peer]:
        """The fleet's hosts as peers."""
        return [
            Peer(name=one.name, fingerprint=one.fingerprint, address=one.address, port=one.port) for one in self.hosts()
        ]

    def standing(self) -> Standing:
        """Everything; raises `ca.none`."""
        member = self.member
        if member is None:
            raise make_error("ca.none", "this host belongs to no CA; see `sealane ca join`")
        certificate, authority = self._certificate(), parse_certificates(self.authority_pem)[0]
        return Standing(
            member=member,
            authority=authority,
            authority_fingerprint=fingerprint(authority.der),
            certificate=certificate,
            claims=None if certificate is None else _claims(certificate),
            revocations=self._list(),
            hosts=self.hosts(),
        )

    def introduction(self, wanted_name: str = "") -> Introduction:
        """What an enclave is told: whose word counts for a peer (that has to be of this name), and what it shows itself."""
        if self.member is None:
            return {"vouchers": NO_VOUCHERS.model_dump_json(), "host_certificate": ""}
        vouchers = self._vouchers(wanted_name)
        own = read_if_there(self._directory / "host.crt")
        return {"vouchers": vouchers.model_dump_json(), "host_certificate": own.decode()}

    def due(self, now: datetime) -> bool:
        """Whether it is time for another certificate."""
        certificate = self._certificate()
        if certificate is None:
            return True
        lived = (now - certificate.not_before) / (certificate.not_after - certificate.not_before)
        return not 0 <= lived < RENEW_AT

    # What changes it

    def check(self, authority_pem: bytes) -> None:
        """Raise `ca.exists` where this host belongs to another CA, `ca.malformed` where this is none."""
        kept = read_if_there(self._directory / "authority.crt")
        if kept and kept != authority_pem:
            raise make_error("ca.exists", "this host belongs to another CA; `sealane ca leave` first")
        Notary(Vouchers(authorities=[TrustedAuthority(certificate=_ascii(authority_pem))]))

    def join(self, member: Member, authority_pem: bytes) -> None:
        """This host belongs to the CA now; raises what `check` raises."""
        self.check(authority_pem)
        write_whole(self._directory / "authority.crt", authority_pem, mode=0o644)
        write_whole(self._directory / "member.json", member.model_dump_json().encode())

    def leave(self) -> None:
        """Belong to no CA any more; raises `ca.none`."""
        if self.member is None:
            raise make_error("ca.none")
        for name in ("member.json", "authority.crt", "revocations.pem", "host.crt", "hosts.json"):
            (self._directory / name).unlink(missing_ok=True)
        self.on_change()

    def take(self, grant: Grant, now: datetime) -> None:
        """Keep what the CA granted, once it is good: the list newer than the last, the certificate for this host's key.

        Raises PeerError `ca.*`; nothing is kept then.
        """
        authority, listed = self.authority_pem, grant.revocations.encode()
        check_newer(read_if_there(self._directory / "revocations.pem"), listed, authority)
        if grant.certificate:
            trusted = TrustedAuthority(certificate=authority.decode(), revocations=grant.revocations)
            self._check_own(grant.certificate.encode(), Vouchers(authorities=[trusted]), now)
        write_whole(self._directory / "revocations.pem", listed)
        write_whole(self._directory / "hosts.json", _HOSTS.dump_json(grant.hosts))
        if grant.certificate:
            write_whole(self._directory / "host.crt", grant.certificate.encode())
        self.on_change()

    def _check_own(self, pem: bytes, vouchers: Vouchers, now: datetime) -> None:
        key = public_key(self._identity.key_pem)
        try:
            (shown,) = parse_certificates(pem)
        except ValueError:
            raise PeerError("ca.malformed", "what the CA gave is no certificate") from None
        own = parse_certificates(self._identity.certificate_pem)[0].der
        Notary(vouchers).judge(own, [shown.der], peer_key=key, taken=(), now=now)

    def _vouchers(self, wanted_name: str) -> Vouchers:
        listed = read_if_there(self._directory / "revocations.pem").decode()
        return Vouchers(
            authorities=[TrustedAuthority(certificate=self.authority_pem.decode(), revocations=listed)],
            stale_list=self._settings.authority.stale_list,
            least_level=self._settings.attestation.least_level,
            wanted_name=wanted_name,
        )

    def _certificate(self) -> Certificate | None:
        content = read_if_there(self._directory / "host.crt")
        return parse_certificates(content)[0] if content else None

    def _list(self) -> RevocationList | None:
        content = read_if_there(self._directory / "revocations.pem")
        return parse_revocation_list(content) if content else None


def _ascii(pem: bytes) -> str:
    try:
        return pem.decode("ascii")
    except UnicodeDecodeError:
        raise PeerError("ca.malformed", "what should be a CA's certificate is no text") from None


def _claims(certificate: Certificate) -> Claims | None:
    content = certificate.extension(CLAIMS)
    try:
        return None if content is None else Claims.model_validate_json(content)
    except ValidationError:
        return None
