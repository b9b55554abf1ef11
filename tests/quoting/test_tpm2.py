"""The TPM driver against a real swtpm: quotes that the production verifier accepts, a log that goes on, keys that are proved."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sealane.attest.peer import Expectations, PeerJudge
from sealane.attest.platformlog import Measured, digest_of
from sealane.attest.reasons import Level
from sealane.attest.reference import Reference
from sealane.errors import AttestationRejected, EvidenceError, HostError
from sealane.quoting.drivers.tpm2 import Tpm2Driver
from sealane.quoting.enrolment import challenge
from sealane.quoting.interface import Configure
from sealane.quoting.log import GrowingLog
from sealane.quoting.process import Platform
from sealane.testing.hosts import SimulatedHost, make_hosts
from sealane.testing.hosttpm import HostTpm, boot_with_tpm

NOW = datetime(2026, 6, 1, tzinfo=UTC)
DATA = bytes(range(32))


@pytest.fixture(scope="module")
def host() -> Iterator[SimulatedHost]:
    with make_hosts(["host-a"], network="loopback") as hosts:
        yield hosts[0]


@pytest.fixture(scope="module")
def tpm(host: SimulatedHost) -> HostTpm:
    return boot_with_tpm(host, [Path(sys.executable)])


def configuration(host: SimulatedHost, tpm: HostTpm, **changes: Any) -> Configure:
    facts = Configure(
        drivers=["tpm2"],
        identity_key="",
        started_ns=1 << 62,
        state=str(host.paths.state),
        run=str(host.paths.run),
        tcti=tpm.tcti,
        boot_log=str(tpm.boot_log),
        runtime_log=str(tpm.runtime_log),
    )
    return facts.model_copy(update=changes)


@pytest.fixture(scope="module")
def platform(host: SimulatedHost, tpm: HostTpm) -> Platform:
    made = Platform(configuration(host, tpm))
    made.measure_binaries([sys.executable])
    return made


def reference_of(platform: Platform, tpm: HostTpm) -> dict[str, Any]:
    return {**platform.own_reference(), "ima": {"digests": tpm.files}, "accept_test_roots": True}


def judge(values: dict[str, Any], **wanted: Any) -> PeerJudge:
    expectations = Expectations(least_level=3, accepted_test_roots=["software-tpm"]).model_copy(update=wanted)
    return PeerJudge("host-a", "00" * 32, lambda: NOW, expectations, Reference.model_validate(values))


def code_of(judge: PeerJudge, pieces: dict[str, bytes], data: bytes = DATA) -> str:
    with pytest.raises(AttestationRejected) as raised:
        judge.appraise(pieces, data)
    return raised.value.code


def test_a_quote_of_a_booted_host_reaches_level_3_under_an_accepted_test_root(platform: Platform, tpm: HostTpm) -> None:
    assert platform.words == "software TPM (swtpm or alike)"
    pieces = platform.evidence(DATA)
    verdict = judge(reference_of(platform, tpm)).appraise(pieces, DATA)
    assert verdict.level is Level.HARDWARE_ROOTED
    assert verdict.production_level is Level.NOTHING
    assert "(software)" in verdict.appraisals[0].root
    assert set(pieces) == {
        "boot-log", "runtime-log", "platform-log", "tpm.quote", "tpm.signature", "tpm.key", "tpm.pcrs",
    }  # fmt: skip


def test_the_default_refuses_it(platform: Platform, tpm: HostTpm) -> None:
    values = reference_of(platform, tpm)
    pieces = platform.evidence(DATA)
    assert code_of(judge(values, accepted_test_roots=[]), pieces) == "attest.test-root"
    assert code_of(judge({**values, "accept_test_roots": False}), pieces) == "attest.test-root"
    assert code_of(judge(values, accepted_test_roots=["00" * 32]), pieces) == "attest.host-unknown"


def test_what_else_is_refused(platform: Platform, tpm: HostTpm) -> None:
    values = reference_of(platform, tpm)
    pieces = platform.evidence(DATA)
    other = {**values["platform"], "qemu": [digest_of(b"another QEMU")]}
    assert code_of(judge({**values, "platform": other}), pieces) == "attest.qemu-changed"
    other = {**values["platform"], "enclave_manifest": [digest_of(b"other code")]}
    assert code_of(judge({**values, "platform": other}), pieces) == "attest.enclave-changed"
    assert code_of(judge({**values, "tpm": {"keys": []}}), pieces) == "attest.host-unknown"
    assert code_of(judge({**values, "hosts": ["ak:00"]}), pieces) == "attest.host-unknown"
    assert code_of(judge(values), pieces, bytes(31) + b"\1") == "attest.binding"
    cut = {**pieces, "boot-log": pieces["boot-log"][: -len(b"simulated initrd") - 50]}
    assert code_of(judge(values), cut) == "attest.log-replay"
    hidden = {**pieces, "platform-log": pieces["platform-log"].partition(b"\n")[2]}
    assert code_of(judge(values), hidden) == "attest.log-replay"
    assert code_of(judge({**values, "ima": {"digests": ["sha256:00"]}}), pieces) == "attest.refused"
    del pieces["runtime-log"]
    assert code_of(judge(values), pieces) == "attest.level"


def test_the_log_goes_on_after_a_restart_and_a_crash(host: SimulatedHost, tpm: HostTpm, platform: Platform) -> None:
    driver = Tpm2Driver(configuration(host, tpm))
    log = GrowingLog(host.paths.run, [driver])
    before = log.content
    log.add([Measured("qemu", "/q", digest_of(b"q"))])
    assert log.content.startswith(before)
    again = GrowingLog(host.paths.run, [driver])
    assert again.content == log.content
    # kept, and the process died before it was extended
    path = host.paths.run / "platform.log"
    line = json.dumps([Measured("qemu", "/r", digest_of(b"r")).as_dict()], sort_keys=True, separators=(",", ":"))
    path.write_bytes(log.content + line.encode() + b"\n")
    resumed = GrowingLog(host.paths.run, [driver])
    assert driver.resume_log(resumed.content.splitlines()) == len(resumed.content.splitlines())
    path.write_bytes(before.partition(b"\n")[2])
    with pytest.raises(HostError) as raised:
        GrowingLog(host.paths.run, [driver])
    assert raised.value.code == "quoting.pcr"
    path.write_bytes(resumed.content)
    with pytest.raises(HostError) as raised:
        GrowingLog(host.paths.run, [Tpm2Driver(configuration(host, tpm, pcr=9))])
    assert raised.value.code == "quoting.pcr"


def test_credential_activation(host: SimulatedHost, tpm: HostTpm) -> None:
    driver = Tpm2Driver(configuration(host, tpm))
    credential, secret = challenge(driver.endorsement_key(), driver.public)
    assert driver.activate(credential) == secret
    with pytest.raises(HostError, match="activatecredential"):
        driver.activate(credential[:-1] + bytes([credential[-1] ^ 1]))
    with pytest.raises(AttestationRejected):  # an endorsement key decrypts and does not sign
        challenge(driver.endorsement_key(), driver.endorsement_key())
    forged = bytearray(driver.public)
    forged[-1] ^= 1
    with pytest.raises((HostError, EvidenceError)):
        driver.activate(challenge(driver.endorsement_key(), bytes(forged))[0])


def test_a_tpm_that_is_not_there(host: SimulatedHost, tpm: HostTpm) -> None:
    with pytest.raises(HostError) as raised:
        Tpm2Driver(configuration(host, tpm, tcti="swtpm:path=/nowhere"))
    assert raised.value.code == "quoting.driver"


def test_a_file_of_the_enclave_that_changed_stops_all_evidence(platform: Platform) -> None:
    stamps = list(platform.manifest.stamps)
    platform.manifest = replace(platform.manifest, stamps=((stamps[0][0], (0, 0, 0, 0, 0)), *stamps[1:]))
    with pytest.raises(HostError) as raised:
        platform.evidence(DATA)
    assert raised.value.code == "enclave.changed"
    platform.manifest = replace(platform.manifest, stamps=tuple(stamps))
    assert platform.evidence(DATA)
    with pytest.raises(HostError) as raised:
        Platform(platform.configuration.model_copy(update={"started_ns": 1}))
    assert raised.value.code == "enclave.changed"
