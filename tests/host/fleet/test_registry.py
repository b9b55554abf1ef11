"""What a CA's host keeps: hosts, certificates, lists with growing numbers; and what a host of the fleet takes from it."""

import stat
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from sealane.crypto.authority import Authority, create_authority, issue_host_certificate
from sealane.crypto.chains import parse_certificates, parse_revocation_list
from sealane.crypto.identity import Identity, create_identity, public_key
from sealane.errors import SealaneError
from sealane.host.config import Settings
from sealane.host.fleet.membership import Member, Membership
from sealane.host.fleet.registry import FleetHost, Registry
from sealane.paths import Paths
from sealane.session.renewal import Grant
from sealane.session.vouching import Claims, parse_vouchers
from tests.host.factories import NOW

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
CLAIMS = Claims(level=1, production_level=1)
IDENTITY = create_identity("host-b", now=NOW)
OTHER = create_identity("host-c", now=NOW)
OFFICE = create_identity("ca-host", now=NOW)


def fleet_host(identity: Identity = IDENTITY, **changes: object) -> FleetHost:
    facts = (identity.name, identity.fingerprint, public_key(identity.key_pem), "approved", "192.0.2.2", 48217, "")
    return FleetHost(*facts, **changes)  # type: ignore[arg-type]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(tmp_path / "ca")
    made.create("fleet", None, now=NOW, lifetime=1000 * DAY)
    made.enrol(fleet_host(), now=NOW)
    return made


@pytest.fixture
def authority(registry: Registry) -> Authority:
    return registry.open(None)


def issue(registry: Registry, authority: Authority, **changes: object) -> bytes:
    return registry.issue(authority, fleet_host(), CLAIMS, **{"now": NOW, "lifetime": DAY, **changes})  # type: ignore[arg-type]


def listed(registry: Registry, authority: Authority, when: timedelta = timedelta()) -> tuple[int | None, int]:
    found = parse_revocation_list(registry.revocations(authority, now=NOW + when, lifetime=DAY))
    return found.number, len(found.serials)


def refused(code: str) -> Any:
    return pytest.raises(SealaneError, match=code.replace(".", r"\."))


def test_the_key_is_its_owner_s_alone(tmp_path: Path, registry: Registry) -> None:
    for name in ("ca.key", "ca.db"):
        assert stat.S_IMODE((tmp_path / "ca" / name).stat().st_mode) == 0o600
    with refused("ca.exists"):
        registry.create("again", None, now=NOW, lifetime=DAY)


def test_a_passphrase(tmp_path: Path) -> None:
    made = Registry(tmp_path / "ca")
    with pytest.raises(SealaneError, match="passphrase"):
        made.create("fleet", b"short", now=NOW, lifetime=DAY)
    made.create("fleet", b"long enough", now=NOW, lifetime=DAY)
    for wrong in (None, b"another one"):
        with refused("ca.locked"):
            Registry(tmp_path / "ca").open(wrong)
    assert Registry(tmp_path / "ca").open(b"long enough").name == "fleet"


def test_a_host_without_a_ca(tmp_path: Path) -> None:
    for ask in (Registry(tmp_path).hosts, lambda: Registry(tmp_path).open(None)):
        with refused("ca.none"):
            ask()


def test_names_and_fingerprints_are_taken_once(registry: Registry) -> None:
    registry.enrol(fleet_host(), now=NOW)  # again
    imposter = create_identity("host-b", now=NOW)
    with refused("trust.exists"):
        registry.enrol(fleet_host(imposter), now=NOW)
    registry.remove("host-b", now=NOW)
    registry.enrol(fleet_host(imposter), now=NOW)


def test_the_list_s_number_grows_when_it_says_something_new(registry: Registry, authority: Authority) -> None:
    assert listed(registry, authority) == (1, 0)
    issue(registry, authority)
    assert listed(registry, authority, HOUR) == (1, 0)
    assert registry.revoke("host-b", now=NOW) == 1
    assert listed(registry, authority, HOUR) == (2, 1)
    assert listed(registry, authority, 2 * HOUR) == (2, 1)
    assert listed(registry, authority, 20 * HOUR) == (3, 1)  # more than half of its time is over
    assert listed(registry, authority, 2 * DAY) == (4, 0)  # what expired is dropped
    assert listed(registry, authority, 2 * DAY + HOUR) == (4, 0)


def test_a_revoked_host_gets_nothing_until_it_is_approved(registry: Registry, authority: Authority) -> None:
    registry.revoke("host-b", now=NOW)
    with refused("ca.revoked"):
        issue(registry, authority)
    registry.approve("host-b", now=NOW)
    issue(registry, authority)
    with refused("ca.host-unknown"):
        registry.revoke("nobody", now=NOW)


# ---- the host's side


@pytest.fixture
def membership(tmp_path: Path, authority: Authority) -> Membership:
    made = Membership(Paths(tmp_path / "state", tmp_path / "run", tmp_path / "etc"), Settings(), IDENTITY)
    made.join(Member(authority_host="ca-host", fingerprint=OFFICE.fingerprint), authority.certificate_pem)
    return made


def grant(registry: Registry, authority: Authority, certificate: bytes = b"") -> Grant:
    pem = registry.revocations(authority, now=NOW, lifetime=DAY)
    return Grant(certificate=certificate.decode(), revocations=pem.decode(), hosts=[fleet_host().entry])


def test_it_is_renewed_when_two_thirds_are_over(
    membership: Membership, registry: Registry, authority: Authority
) -> None:
    assert membership.due(NOW)
    membership.take(grant(registry, authority, issue(registry, authority)), NOW)
    certificate = membership.standing().certificate
    assert certificate is not None
    life = certificate.not_after - certificate.not_before
    assert not membership.due(NOW)
    assert not membership.due(certificate.not_before + life * 0.66)
    assert membership.due(certificate.not_before + life * 0.67)
    assert membership.due(certificate.not_before - HOUR)  # the clock was wrong then or is now
    told = membership.introduction("host-c")
    assert parse_vouchers(told["vouchers"]).wanted_name == "host-c"
    assert "BEGIN CERTIFICATE" in told["host_certificate"]


def test_an_older_list_is_not_taken(membership: Membership, registry: Registry, authority: Authority) -> None:
    old = grant(registry, authority)
    issue(registry, authority)
    registry.revoke("host-b", now=NOW)
    membership.take(grant(registry, authority), NOW)
    with refused("ca.list"):
        membership.take(old, NOW)
    kept = membership.standing().revocations
    assert kept is not None
    assert kept.number == 2


def test_a_certificate_that_is_not_for_this_host_is_not_kept(
    membership: Membership, registry: Registry, authority: Authority
) -> None:
    another = create_authority("fleet", now=NOW, lifetime=DAY)
    key = public_key(IDENTITY.key_pem)
    false = issue_host_certificate(another, "host-b", key, CLAIMS.encode(), now=NOW, lifetime=DAY).pem
    theirs = issue_host_certificate(
        authority, "host-c", public_key(OTHER.key_pem), CLAIMS.encode(), now=NOW, lifetime=DAY
    ).pem
    for pem, code in ((false, "ca.unknown"), (theirs, "ca.key"), (b"nonsense", "ca.malformed")):
        with refused(code):
            membership.take(grant(registry, authority, pem), NOW)
    assert membership.standing().certificate is None


def test_one_ca_for_a_host(membership: Membership) -> None:
    another = create_authority("another", now=NOW, lifetime=DAY)
    member = Member(authority_host="x", fingerprint=OFFICE.fingerprint)
    with refused("ca.exists"):
        membership.join(member, another.certificate_pem)
    membership.leave()
    assert parse_vouchers(membership.introduction()["vouchers"]).authorities == []
    membership.join(member, another.certificate_pem)
    assert parse_certificates(membership.authority_pem)[0].name == "another"


def test_what_is_no_ca_is_not_joined(tmp_path: Path) -> None:
    made = Membership(Paths(tmp_path / "state", tmp_path / "run", tmp_path / "etc"), Settings(), IDENTITY)
    for pem in (IDENTITY.certificate_pem, b"nonsense", b"\xff"):
        with refused("ca.malformed"):
            made.check(pem)
