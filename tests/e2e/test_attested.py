"""Two agents, each with a software TPM as its host's: attested by quote, boot log and runtime log, or not moved at all."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from sealane.host.models import Migration
from sealane.testing.attested import AttestedHosts
from sealane.testing.qemu import find_qemu
from tests.e2e.refusals import assert_refused
from tests.e2e.rig import SLOWLY, Rig, make_rig
from tests.e2e.test_policy import last_words, policy

pytestmark = pytest.mark.e2e

QEMU = find_qemu()
HOSTS = AttestedHosts([QEMU.path.resolve()], again_every_s=0.5)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with make_rig(qemu=QEMU, settings=HOSTS) as made:
        yield made


def test_it_migrates_at_level_3_under_a_test_root_that_both_accept(rig: Rig) -> None:
    attempt = rig.attempt()
    rig.assert_arrived(attempt)
    for end in (attempt.source, attempt.destination):
        assert end is not None
        assert end.peer_trust is not None
        assert end.peer_trust.level == 3
        assert "(software)" in end.peer_trust.root
        assert any("test-root-accepted" in reason or "software" in reason for reason in end.peer_trust.reasons)
        assert {each.kind for each in end.peer_trust.evidence} >= {
            "tpm.quote",
            "boot-log",
            "runtime-log",
            "platform-log",
        }


def another_qemu(values: dict[str, Any]) -> None:
    values["platform"]["qemu"] = ["sha256:" + "00" * 32]


def another_enclave(values: dict[str, Any]) -> None:
    values["platform"]["enclave_manifest"] = ["sha256:" + "00" * 32]


def another_key(values: dict[str, Any]) -> None:
    values["tpm"]["keys"][0]["digest"] = "00" * 32


def another_host(values: dict[str, Any]) -> None:
    values["peers"] = {"somebody-else": values["hosts"]}


def another_boot(values: dict[str, Any]) -> None:
    values["tpm"]["pcrs"]["sha256"]["4"] = ["00" * 32]


def no_runtime_values(values: dict[str, Any]) -> None:
    del values["ima"]


def no_test_roots(values: dict[str, Any]) -> None:
    values["accept_test_roots"] = False


CHANGES: list[tuple[Change, str, str]] = [
    (another_qemu, "attest.qemu-changed", "home"),
    (another_qemu, "attest.qemu-changed", "away"),
    (another_enclave, "attest.enclave-changed", "away"),
    (another_key, "attest.host-unknown", "home"),
    (another_host, "attest.host-unknown", "away"),
    (another_boot, "attest.refused", "home"),
    (no_runtime_values, "attest.level", "away"),
    (no_test_roots, "attest.test-root", "home"),
]


@pytest.mark.parametrize(
    ("change", "code", "judge"), CHANGES, ids=[f"{change.__name__} {judge}" for change, _, judge in CHANGES]
)
def test_a_peer_that_is_not_what_was_expected(rig: Rig, judge: str, change: Change, code: str) -> None:
    path = getattr(rig, judge).host.paths.config / "reference-values.json"
    kept = path.read_text()
    values = json.loads(kept)
    change(values)
    path.write_text(json.dumps(values))
    try:
        attempt = rig.attempt()
    finally:
        path.write_text(kept)
    assert_refused(rig, attempt, code, getattr(rig, judge))


@pytest.mark.parametrize("judge", ["home", "away"])
def test_a_policy_that_changed_counts_when_the_peer_attests_again(rig: Rig, judge: str) -> None:
    """The copy began with a yes; the next round of attestation asks anew, and the VM stays where it is."""
    end = getattr(rig, judge)
    begun = ExitStack()
    with begun:
        attempt = rig.attempt(
            during=lambda _: begun.enter_context(policy(end, "forbid (principal, action, resource);")), **SLOWLY
        )
    rig.assert_aborted(attempt, "policy.denied", destination=["policy.denied"])
    assert attempt.source.progress.bytes_wire > 0
    assert last_words(end)[:2] == ("policy.denied", "deny")
    other = rig.away if judge == "home" else rig.home
    assert last_words(other)[:2] == ("policy.denied", "allow")


def test_a_tpm_that_measures_something_else_in_mid_copy_ends_it(rig: Rig) -> None:
    """Somebody extends the PCR of Sealane's log: the destination's next quote no longer fits what it says."""
    away = rig.away

    def meddle(_: Migration) -> None:
        environment = {**os.environ, "TPM2TOOLS_TCTI": HOSTS.tcti(away.host)}
        subprocess.run(["tpm2_pcrextend", "13:sha256=" + "66" * 32], env=environment, check=True, capture_output=True)

    attempt = rig.attempt(during=meddle, **SLOWLY)
    assert attempt.source.state == "aborted"
    assert attempt.code == "attest.log-replay", attempt.source.problem
    rig.assert_goes_on()
