"""A CA that vouches for peers: over real handshakes in memory, each check by itself, and any bytes."""

import itertools
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from sealane.crypto.authority import (
    CLAIMS,
    Authority,
    AuthorityLocked,
    create_authority,
    issue_host_certificate,
    issue_revocation_list,
    load_authority,
)
from sealane.crypto.identity import Identity, create_identity, load_identity_pem, public_key
from sealane.crypto.signatures import KeyMalformed
from sealane.errors import InternalError, PeerError
from sealane.session.channel import Channel, Established
from sealane.session.vouching import Claims, Notary, TrustedAuthority, Vouchers, check_newer, parse_vouchers
from tests.seal.rig import PROPERTY
from tests.session.rig import DAY, DESTINATION, NOW, SOURCE, STRANGER, channel, converse

FLEET = create_authority("fleet", now=NOW - DAY, lifetime=100 * DAY)
# Another key under the same name: what an attacker would make.
FALSE = create_authority("fleet", now=NOW - DAY, lifetime=100 * DAY)
HOUR = timedelta(hours=1)
CLAIMED = Claims(level=3, production_level=1, root="software TPM", hardware=["ak:" + "11" * 32])


def certified(host: Identity = SOURCE, by: Authority = FLEET, **changes: Any) -> bytes:
    facts = {"name": host.name, "claims": CLAIMED.encode(), "now": NOW, "lifetime": DAY, **changes}
    name, claims = facts.pop("name"), facts.pop("claims")
    return issue_host_certificate(by, name, public_key(host.key_pem), claims, **facts).pem


def revocations(*serials: int, by: Authority = FLEET, now: datetime = NOW, number: int = 1) -> bytes:
    return issue_revocation_list(by, [(one, now) for one in serials], number=number, now=now, lifetime=DAY)


def vouchers(*, authority: Authority = FLEET, listed: bytes | None = None, **changes: Any) -> Vouchers:
    listed = revocations() if listed is None else listed
    trusted = TrustedAuthority(certificate=authority.certificate_pem.decode(), revocations=listed.decode())
    return Vouchers(authorities=[trusted], **changes)


@dataclass
class Outcome:
    code: str | None
    established: Established | None
    told: str | None


def meet(
    certificate: bytes = b"",
    wanted: Vouchers | None = None,
    *,
    identity: Identity = SOURCE,
    trusted: dict[str, str] | None = None,
    now: datetime = NOW,
) -> Outcome:
    """The source shows this certificate to a destination that never heard of it."""
    source = channel("source", identity=identity, host_certificate=certificate)
    wanted = vouchers() if wanted is None else wanted
    destination: Channel = channel("destination", trusted=trusted or {}, vouchers=wanted, now=now)
    ends = converse(source, destination)
    found = next((event for event in ends[1].events if isinstance(event, Established)), None)
    refusal = next((str(event.error.code) for event in ends[0].events if hasattr(event, "error")), ends[0].code)
    return Outcome(ends[1].code, found, refusal)


def der_of(pem: bytes) -> bytes:
    return x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)


def serial_of(pem: bytes) -> int:
    return x509.load_pem_x509_certificate(pem).serial_number


# ---- two that never paired


def test_hosts_of_one_ca_meet_without_being_paired() -> None:
    outcome = meet(certified())
    assert outcome.code is None
    assert outcome.established is not None
    assert outcome.established.peer_name == "source"
    assert outcome.established.peer_fingerprint == SOURCE.fingerprint
    assert outcome.established.vouched is not None
    assert (outcome.established.vouched.authority, outcome.established.vouched.claims) == ("fleet", CLAIMED)


def test_both_ends_by_the_ca() -> None:
    facts = {"trusted": {}, "vouchers": vouchers()}
    source = channel("source", host_certificate=certified(), trusted={}, vouchers=vouchers(wanted_name="destination"))
    destination = channel("destination", host_certificate=certified(DESTINATION), **facts)
    ends = converse(source, destination)
    assert [end.code for end in ends] == [None, None]
    assert source.migration_secret() == destination.migration_secret()


def test_the_name_is_the_ca_s_and_not_what_the_host_calls_itself() -> None:
    impostor = create_identity("destination", now=NOW)  # calls itself so
    outcome = meet(certified(impostor, name="host-x"), identity=impostor)
    assert outcome.established is not None
    assert outcome.established.peer_name == "host-x"


def test_a_paired_host_needs_no_ca() -> None:
    outcome = meet(b"", trusted={SOURCE.fingerprint: "source"})
    assert outcome.established is not None
    assert outcome.established.vouched is None


# ---- each check


def test_nothing_shown() -> None:
    assert meet(b"").code == "peer.unknown"


def test_no_ca_is_trusted() -> None:
    assert meet(certified(), Vouchers()).code == "peer.unknown"


@pytest.mark.parametrize("authority", [FALSE, create_authority("another", now=NOW, lifetime=DAY)])
def test_another_ca_with_the_same_name_or_another_one(authority: Authority) -> None:
    assert meet(certified(by=authority)).code == "ca.unknown"


def test_a_certificate_of_anothers_key() -> None:
    assert meet(certified(SOURCE), identity=STRANGER).code == "ca.key"


def test_expired() -> None:
    assert meet(certified(now=NOW - DAY - HOUR)).code == "ca.expired"
    assert meet(certified(lifetime=HOUR), now=NOW + HOUR).code is None
    assert meet(certified(lifetime=HOUR), now=NOW + HOUR + timedelta(seconds=1)).code == "ca.expired"


def test_not_valid_yet() -> None:
    assert meet(certified(now=NOW + HOUR)).code == "ca.not-yet-valid"


def test_the_ca_itself_is_over() -> None:
    brief = create_authority("brief", now=NOW - 10 * DAY, lifetime=DAY)
    listed = issue_revocation_list(brief, [], number=1, now=NOW, lifetime=DAY)
    outcome = meet(certified(by=brief, now=NOW - 10 * DAY), vouchers(authority=brief, listed=listed))
    assert outcome.code == "ca.authority-over"


def test_no_host_certificate_outlives_its_ca() -> None:
    brief = create_authority("brief", now=NOW, lifetime=HOUR)
    made = issue_host_certificate(brief, "a", public_key(SOURCE.key_pem), b"{}", now=NOW, lifetime=DAY)
    assert made.not_after == brief.not_after


def test_revoked() -> None:
    mine, other = certified(), certified(DESTINATION)
    assert meet(mine, vouchers(listed=revocations(serial_of(mine)))).code == "ca.revoked"
    assert meet(mine, vouchers(listed=revocations(serial_of(other)))).code is None


def test_revoked_counts_also_on_a_stale_list() -> None:
    mine = certified()
    old = revocations(serial_of(mine), now=NOW - 5 * DAY)
    assert meet(mine, vouchers(listed=old, stale_list="accept")).code == "ca.revoked"


def test_a_stale_list_refuses_unless_the_settings_accept_it() -> None:
    old = revocations(now=NOW - DAY - HOUR)
    assert meet(certified(), vouchers(listed=old)).code == "ca.list-stale"
    assert meet(certified(), vouchers(listed=old, stale_list="accept")).code is None
    future = revocations(now=NOW + DAY)
    assert meet(certified(), vouchers(listed=future)).code == "ca.list-stale"


def test_no_list_refuses() -> None:
    assert meet(certified(), vouchers(listed=b"", stale_list="accept")).code == "ca.list"


def test_a_list_that_the_ca_did_not_sign() -> None:
    assert meet(certified(), vouchers(listed=revocations(by=FALSE))).code == "ca.list"


def test_a_list_without_a_number() -> None:
    builder = x509.CertificateRevocationListBuilder(x509.load_pem_x509_certificate(FLEET.certificate_pem).subject)
    bare = builder.last_update(NOW).next_update(NOW + DAY).sign(FLEET.key, None)
    assert meet(certified(), vouchers(listed=bare.public_bytes(serialization.Encoding.PEM))).code == "ca.list"


def test_another_name_than_the_wanted_one() -> None:
    for name, code in (("destination", None), ("host-x", "ca.name")):
        source = channel("source", trusted={}, vouchers=vouchers(wanted_name="destination"))
        destination = channel("destination", host_certificate=certified(DESTINATION, name=name))
        ends = converse(source, destination)
        assert ends[0].code == code


def test_the_name_of_a_host_that_is_trusted_by_itself() -> None:
    assert meet(certified(name="stranger"), trusted={STRANGER.fingerprint: "stranger"}).code == "ca.name"


def test_the_level_that_the_ca_found() -> None:
    low = certified(claims=Claims(level=1, production_level=1).encode())
    assert meet(low, vouchers(least_level=3)).code == "ca.level"
    assert meet(certified(), vouchers(least_level=3)).code is None


def test_a_ca_certificate_is_no_host() -> None:
    """Whoever holds the CA's key shows its certificate, as its own or behind a host's."""
    raw = FLEET.key_pem(None)
    as_host = load_identity_pem(raw, FLEET.certificate_pem)
    assert meet(b"", identity=as_host).code == "ca.not-a-host"
    mine = create_identity("fleet", now=NOW, key_pem=raw)
    assert meet(FLEET.certificate_pem, identity=mine).code == "ca.not-a-host"


def test_a_host_cannot_issue() -> None:
    """The holder of a host certificate signs one for another."""
    host = x509.load_pem_x509_certificate(certified(STRANGER))
    lower = load_authority_like(STRANGER, host)
    made = issue_host_certificate(lower, "source", public_key(SOURCE.key_pem), CLAIMED.encode(), now=NOW, lifetime=DAY)
    assert meet(made.pem).code == "ca.unknown"


def load_authority_like(host: Identity, certificate: x509.Certificate) -> Authority:
    key = serialization.load_pem_private_key(host.key_pem, None)
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return Authority(pem, "stranger", "", NOW + DAY, key)  # type: ignore[arg-type]


@pytest.mark.parametrize("claims", [b"", b"{}", b"[]", b'{"level":0,"production_level":0}', b"{" * 3000, b"\xff"])
def test_claims_that_cannot_be_read(claims: bytes) -> None:
    assert meet(certified(claims=claims)).code == "ca.malformed"


def test_an_unknown_critical_extension() -> None:
    key = serialization.load_pem_private_key(SOURCE.key_pem, None)
    issuer = x509.load_pem_x509_certificate(FLEET.certificate_pem)
    made = (
        x509.CertificateBuilder(issuer.subject, issuer.subject, key.public_key(), 77, NOW, NOW + DAY)  # type: ignore[arg-type]
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"x"), critical=True)
        .add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(CLAIMS), CLAIMED.encode()), critical=False)
        .sign(FLEET.key, None)
    )
    assert meet(made.public_bytes(serialization.Encoding.PEM)).code == "ca.malformed"


def test_the_peer_is_told_why() -> None:
    assert meet(certified(now=NOW - 3 * DAY)).told == "ca.expired"


def test_one_flipped_bit_of_what_was_signed() -> None:
    good = der_of(certified())
    notary = Notary(vouchers())
    own = der_of(SOURCE.certificate_pem)
    key = public_key(SOURCE.key_pem)
    assert notary.judge(own, [good], peer_key=key, taken=[], now=NOW).name == "source"
    for place in itertools.chain(range(0, len(good), 7), [len(good) - 1]):
        changed = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        with pytest.raises(PeerError, match=r"ca\."):
            notary.judge(own, [changed], peer_key=key, taken=[], now=NOW)


@PROPERTY
@given(st.lists(st.binary(max_size=300), max_size=2))
def test_any_bytes_are_refused(shown: list[bytes]) -> None:
    with pytest.raises(PeerError):
        Notary(vouchers()).judge(
            der_of(SOURCE.certificate_pem), shown, peer_key=public_key(SOURCE.key_pem), taken=[], now=NOW
        )


# ---- lists that come, keys, and what this host keeps


def test_a_list_with_a_lower_number_is_not_taken() -> None:
    kept, older = revocations(number=7), revocations(number=6)
    assert check_newer(kept, revocations(number=7), FLEET.certificate_pem).number == 7
    assert check_newer(b"", older, FLEET.certificate_pem).number == 6
    for bad in (older, revocations(number=8, by=FALSE), b"nonsense"):
        with pytest.raises(PeerError, match=r"ca\.list"):
            check_newer(kept, bad, FLEET.certificate_pem)


def test_the_key_at_rest() -> None:
    locked = FLEET.key_pem(b"correct horse")
    assert b"ENCRYPTED" in locked
    assert load_authority(FLEET.certificate_pem, locked, b"correct horse").fingerprint == FLEET.fingerprint
    for passphrase in (None, b"", b"wrong"):
        with pytest.raises(AuthorityLocked):
            load_authority(FLEET.certificate_pem, locked, passphrase)
    with pytest.raises(ValueError, match="belong"):
        load_authority(FALSE.certificate_pem, FLEET.key_pem(None), None)
    assert "key" not in repr(FLEET).replace("pem", "")


def test_only_a_host_s_kind_of_key_is_certified() -> None:
    for bad in (b"", b"\x30\x03abc"):
        with pytest.raises(KeyMalformed):
            issue_host_certificate(FLEET, "a", bad, b"{}", now=NOW, lifetime=DAY)


def test_what_the_agent_tells_its_enclave() -> None:
    told = vouchers(wanted_name="host-b")
    assert parse_vouchers(told.model_dump_json()) == told
    assert parse_vouchers("") == Vouchers()
    with pytest.raises(InternalError):
        parse_vouchers('{"authorities": 1}')
    with pytest.raises(PeerError, match="is none"):
        Notary(Vouchers(authorities=[TrustedAuthority(certificate=SOURCE.certificate_pem.decode())]))
