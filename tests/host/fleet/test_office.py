"""A host and its CA's host over a real connection, with an injected clock: what is granted, and what evidence does not do."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sealane.crypto.identity import public_key
from sealane.errors import SealaneError
from sealane.host.config import Settings
from sealane.host.fleet.membership import Member, Membership
from sealane.host.fleet.office import Office
from sealane.host.fleet.registry import FleetHost, Registry
from sealane.host.fleet.renewing import FleetHostSide
from sealane.paths import Paths
from sealane.session.preface import PREFACE_BYTES
from tests.enclave.quoting import quoting_line
from tests.session.rig import DAY, DESTINATION, NOW, SOURCE, STRANGER, software_evidence

HARDWARE = {"version": 1, "hosts": ["ak:" + "11" * 32], "tpm": {"keys": [{"digest": "11" * 32, "root": "software"}]}}


@dataclass
class Fleet:
    """SOURCE belongs to the CA on DESTINATION. `policy` is the CA's host's, `quote` what SOURCE's quoting process gives."""

    registry: Registry
    office: Office
    host: FleetHostSide
    membership: Membership
    policy: dict[str, bytes] = field(default_factory=dict)
    quote: Any = None

    async def refused(self, code: str) -> None:
        with pytest.raises(SealaneError) as raised:
            await self.host.renew("certificate")
        assert raised.value.code == code
        assert self.membership.standing().certificate is None
        assert [one.not_after for one in self.registry.hosts()] == [None]


def enrolled(reference: str = "") -> FleetHost:
    key = public_key(SOURCE.key_pem)
    return FleetHost("source", SOURCE.fingerprint, key, "approved", None, None, reference)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    port = listening.getsockname()[1]
    registry = Registry(tmp_path / "ca")
    authority = registry.create("fleet", None, now=NOW, lifetime=1000 * DAY)
    registry.enrol(enrolled(), now=NOW)
    made: list[Fleet] = []

    def lines(identity: Any) -> SimpleNamespace:
        def connect(_: object = ()) -> socket.socket:
            return quoting_line(identity, policy=made[0].policy, quote=made[0].quote)[0]

        return SimpleNamespace(connect_agent=connect)

    settings = Settings(name="x")
    paths = Paths(tmp_path / "state", tmp_path / "run", tmp_path / "etc")
    at_office = SimpleNamespace(identity=DESTINATION, settings=settings, quoting=lines(DESTINATION))
    at_host = SimpleNamespace(
        identity=SOURCE, settings=settings, quoting=lines(SOURCE), paths=paths, port=48217, binaries=list
    )
    membership = Membership(paths, settings, SOURCE)
    member = Member(authority_host="ca", fingerprint=DESTINATION.fingerprint, address="127.0.0.1", port=port)
    membership.join(member, authority.certificate_pem)
    office = Office(cast(Any, at_office), registry, lambda: NOW)
    made.append(Fleet(registry, office, FleetHostSide(cast(Any, at_host), membership, lambda: NOW), membership))

    async def accept() -> None:
        loop = asyncio.get_running_loop()
        while True:
            connection, _ = await loop.sock_accept(listening)
            connection.setblocking(False)
            await loop.sock_recv(connection, PREFACE_BYTES)
            office.welcome(connection)

    accepting = asyncio.create_task(accept())
    yield made[0]
    accepting.cancel()
    await asyncio.wait([accepting])
    await office.stop()
    listening.close()


async def test_a_host_is_granted_a_certificate_for_a_day(fleet: Fleet) -> None:
    await fleet.host.renew("certificate")
    standing = fleet.membership.standing()
    assert standing.certificate is not None
    assert standing.certificate.not_after == NOW + timedelta(hours=24)
    assert standing.claims is not None
    assert (standing.claims.level, standing.claims.production_level) == (1, 1)
    (host,) = fleet.registry.hosts()
    assert (host.level, host.address, host.port) == (1, "127.0.0.1", 48217)
    before = standing.certificate.serial
    await fleet.host.renew("news")
    after = fleet.membership.standing().certificate
    assert after is not None
    assert after.serial == before


async def test_a_host_below_the_ca_s_level(fleet: Fleet) -> None:
    fleet.policy["expectations"] = json.dumps({"least_level": 2}).encode()
    await fleet.refused("attest.level")


async def test_another_host_s_evidence(fleet: Fleet) -> None:
    fleet.quote = lambda user_data: software_evidence(STRANGER, user_data)
    await fleet.refused("attest.host-unknown")


async def test_evidence_of_another_renewal(fleet: Fleet) -> None:
    fleet.quote = lambda user_data: software_evidence(SOURCE, bytes(range(32)))
    await fleet.refused("attest.binding")


async def test_no_evidence_at_all(fleet: Fleet) -> None:
    nothing: Mapping[str, bytes] = {}
    fleet.quote = lambda user_data: nothing
    await fleet.refused("attest.refused")


async def test_a_host_that_joined_with_a_tpm_shows_none(fleet: Fleet) -> None:
    fleet.registry.enrol(enrolled(json.dumps(HARDWARE)), now=NOW)
    await fleet.refused("attest.hardware-changed")


async def test_a_revoked_host_gets_nothing(fleet: Fleet) -> None:
    await fleet.host.renew("certificate")
    fleet.registry.revoke("source", now=NOW)
    for want in ("certificate", "news"):
        with pytest.raises(SealaneError, match=r"ca\.revoked"):
            await fleet.host.renew(want)
    problem = fleet.host.status().problem
    assert problem is not None
    assert problem.code == "ca.revoked"


async def test_a_host_that_the_ca_forgot(fleet: Fleet) -> None:
    fleet.registry.remove("source", now=NOW)
    with pytest.raises(SealaneError, match=r"ca\.not-enrolled"):
        await fleet.host.renew("news")
