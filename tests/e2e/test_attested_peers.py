"""Peers that really are not what they were: a source of VMs, a host that changes, and one that nobody vouched for.

Three agents with a software TPM each. The second runs from a copy of the package and may be changed: its boot log, its QEMU, its
enclave's code, each by one byte. The third one's certificate is trusted, its TPM is endorsed by nobody, and it lies: it has the
second one answer in its place. After each refusal no page was sent, the VM runs on, and the receipts at both ends say why.
"""

import base64
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import sealane
from sealane.crypto.identity import create_identity, save_identity
from sealane.host.config import AGENT_FILE
from sealane.quoting.manifest import digest_file
from sealane.testing.attested import AttestedHosts
from sealane.testing.hosts import make_hosts
from sealane.testing.pair import PROGRAM, AgentHost, HostPair
from sealane.testing.qemu import find_qemu
from tests.e2e.refusals import assert_refused, last_receipt
from tests.e2e.rig import HARDWARE, WORKLOAD, Rig

pytestmark = pytest.mark.e2e

QEMU = find_qemu()
BINARY = QEMU.path.resolve()
# Where this QEMU has its firmware: a copy that lies elsewhere does not find it by itself.
DATA = BINARY.parents[1] / "share" / "qemu"
Change = Callable[[dict[str, Any]], object]


@dataclass
class Scene:
    """`rig` moves the guest between judge and suspect; the liar is a third one."""

    rig: Rig
    judge: AgentHost
    suspect: AgentHost
    liar: AgentHost
    hosts: AttestedHosts
    package: Path
    lie: Path

    def expect(self, change: Change, end: AgentHost | None = None) -> None:
        """Change what a host (the judge) expects of its peers."""
        path = (end or self.judge).host.paths.config / "reference-values.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    def restart(self) -> None:
        """Another agent for the suspect; returns when it has measured itself."""
        assert self.suspect.agent is not None
        self.suspect.agent.stop()
        (self.suspect.host.paths.run / "reference-values.json").unlink()
        self.suspect.start_agent()
        self.hosts.values_of(self.suspect.host)
        self.rig.note_descriptors()

    @contextmanager
    def towards_the_liar(self) -> Iterator[Rig]:
        """While it lasts, migrations go to the third host."""
        self.rig.away = self.liar
        self.rig.note_descriptors()
        try:
            yield self.rig
        finally:
            self.rig.away = self.suspect
            self.rig.note_descriptors()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    place = tmp_path_factory.mktemp("peers")
    package, lie = place / "package", place / "lie"
    shutil.copytree(Path(sealane.__file__).parent, package / "sealane", ignore=shutil.ignore_patterns("__pycache__"))
    lie.write_text("")
    programs = [
        PROGRAM,
        ("env", f"PYTHONPATH={package}", *PROGRAM),
        (sys.executable, "-m", "sealane.testing.malice", str(lie), "sealane.cli"),
    ]
    attested = AttestedHosts([BINARY])
    with ExitStack() as stack:
        hosts = stack.enter_context(make_hosts(["host-a", "host-b", "host-c"]))
        ends = []
        for host, program in zip(hosts, programs, strict=True):
            identity = create_identity(host.name, now=datetime.now(UTC))
            save_identity(host.paths, identity)
            (host.paths.config / AGENT_FILE).write_text(attested.settings(host))
            ends.append(AgentHost(host, identity, program=program))
            ends[-1].start_agent()
        judge, suspect, liar = ends
        for one, other in ((judge, suspect), (suspect, judge), (judge, liar), (liar, judge), (suspect, liar)):
            one.trust(other)
        attested.introduce([judge.host, suspect.host])
        (liar.host.paths.config / "reference-values.json").write_text(json.dumps(attested.values_of(judge.host)))
        pair = HostPair(judge, suspect)
        guest = pair.add_guest(hardware=HARDWARE, workload=WORKLOAD, qemu=QEMU)
        pair.start_guest(guest, judge)
        rig = Rig(pair, guest, judge, suspect)
        rig.settings = rig.settings_of(judge)
        rig.note_descriptors()
        yield Scene(rig, judge, suspect, liar, attested, package, lie)
        for end in ends:
            assert end.agent is not None
            assert "Traceback" not in end.agent.output, end.agent.output[-4000:]


def change_a_byte(path: Path, of: bytes) -> None:
    """Add one to a byte, in place: the first of `of`."""
    content = bytearray(path.read_bytes())
    content[content.index(of)] += 1
    path.write_bytes(content)


def said_of_the_peer(end: AgentHost) -> str:
    """What the verdict in the last receipt says."""
    verdict = last_receipt(end).verdicts.of_peer
    assert verdict is not None
    return "\n".join(verdict.reasons)


def test_the_same_software_measures_the_same_wherever_it_lies(scene: Scene) -> None:
    """So that what follows differs by the change alone."""
    values = [scene.hosts.values_of(end.host)["platform"]["enclave_manifest"] for end in (scene.judge, scene.suspect)]
    assert values[0] == values[1]
    scene.rig.migrate_and_return()


def test_a_boot_log_that_does_not_replay_to_its_pcrs(scene: Scene) -> None:
    path = scene.suspect.host.scratch / "boot-log"
    kept = path.read_bytes()
    log = bytearray(kept)
    log[log.index(b"simulated loader") - 8] ^= 1  # a digest
    path.write_bytes(log)
    try:
        assert_refused(scene.rig, scene.rig.attempt(), "attest.log-replay", scene.judge)
    finally:
        path.write_bytes(kept)


def test_a_key_certified_by_a_tpm_that_nobody_endorsed(scene: Scene) -> None:
    """Credential activation has shown its key to be in its TPM; whose TPM that is, nobody has said."""
    key = scene.hosts.values_of(scene.liar.host)["hosts"]
    scene.expect(lambda values: values["peers"].update({"host-c": key}))
    with scene.towards_the_liar() as rig:
        assert_refused(rig, rig.attempt(), "attest.host-unknown", scene.judge)
    assert "no reference value vouches for the attestation key" in said_of_the_peer(scene.judge)


def test_a_relay_through_a_third_host(scene: Scene) -> None:
    """The judge even expects the honest host's hardware there: that the evidence is another channel's is all that is wrong."""
    scene.expect(lambda values: values["peers"].update({"host-c": values["peers"]["host-b"]}))
    honest = scene.suspect
    scene.lie.write_text(
        f"relay {honest.host.address} {honest.host.port} {honest.identity.fingerprint} {scene.rig.guest.name}"
    )
    try:
        with scene.towards_the_liar() as rig:
            assert_refused(rig, rig.attempt(), "attest.binding", scene.judge)
    finally:
        scene.lie.write_text("")
    said = said_of_the_peer(scene.judge)
    assert "the user data is not what was asked for" in said
    assert "vouches" not in said
    assert "another host" not in said
    verdict = last_receipt(scene.judge).verdicts.of_peer
    assert verdict is not None
    key = base64.b64decode(json.loads((honest.host.paths.run / "tpm-keys.json").read_text())["ak"])
    shown = {each.kind: each.sha256 for each in verdict.evidence}
    assert shown["tpm.key"] == hashlib.sha256(key).hexdigest()  # so it was the honest host's TPM that answered


def test_a_file_of_the_enclave_that_changes_while_its_agent_runs(scene: Scene) -> None:
    """Its own quoting process refuses; the peer never sees the code."""
    path = scene.package / "sealane" / "enclave" / "lane.py"
    kept = path.read_bytes()
    change_a_byte(path, b"One lane")
    try:
        assert_refused(scene.rig, scene.rig.attempt(), "enclave.changed", None)
    finally:
        path.write_bytes(kept)
    assert_refused(scene.rig, scene.rig.attempt(), "enclave.changed", None)  # put back is changed too
    scene.restart()
    scene.rig.migrate_and_return()


def test_a_qemu_that_differs_by_one_byte(scene: Scene, tmp_path: Path) -> None:
    """It runs the VM as well as ever: at its destination, and as a source on the way back."""
    rig, other = scene.rig, tmp_path / "qemu-system-x86_64"
    shutil.copy2(BINARY, other)
    with other.open("ab") as file:
        file.write(b"\0")
    command = rig.guest.machines[scene.suspect.name].command()
    command[command.index(str(QEMU.path))] = str(other)
    with rig.launched_as([*command, "-L", str(DATA)]):
        assert_refused(rig, rig.attempt(), "attest.qemu-changed", scene.judge)
        kept = (scene.judge.host.paths.config / "reference-values.json").read_text()
        scene.expect(lambda values: values["platform"]["qemu"].append(digest_file(other)))
        rig.assert_arrived(rig.attempt())
        assert os.path.samefile(f"/proc/{rig.qemu_of(scene.suspect)}/exe", other)
        (scene.judge.host.paths.config / "reference-values.json").write_text(kept)
        assert_refused(rig, rig.attempt(), "attest.qemu-changed", scene.judge)
        scene.expect(lambda values: values["platform"]["qemu"].append(digest_file(other)))
        rig.assert_arrived(rig.attempt())


def test_an_enclave_whose_code_differs_by_one_byte(scene: Scene) -> None:
    """The changed code runs, and is measured as what it is. Last, as what was measured cannot be taken back."""
    change_a_byte(scene.package / "sealane" / "enclave" / "lane.py", b"One lane")
    scene.restart()
    assert_refused(scene.rig, scene.rig.attempt(), "attest.enclave-changed", scene.judge)
