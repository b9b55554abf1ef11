"""Each protection moves a guest that writes, and an eavesdropper reads under it what it is said to leave, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sealane.errors import SealaneError
from sealane.host.config import AGENT_FILE
from sealane.host.models import MigrationRequest, NotSent
from sealane.host.receipts.verify import receipts_in
from sealane.seal.protect import PROTECTIONS, readable_words
from sealane.testing.guest.files import Files, chosen_files
from sealane.testing.machine import Workload
from sealane.testing.pair import AgentHost
from sealane.testing.qemu import all_qemus, find_qemu
from sealane.testing.wiretap import Recorder
from tests.e2e.rig import HARDWARE, Rig, make_rig

pytestmark = pytest.mark.e2e

CANARY = "a-secret-in-the-heap-of-a-process-4c1f"
PAGE = 4096
WEAK = [name for name in PROTECTIONS if name != "sealed"]
CODED = [name for name in WEAK if name != "selective"]
ALLOWED = f"allowed_protections = {list(PROTECTIONS)!r}\n"
# Pages of files that no process has opened are the kernel's.
FILES = Files(programs_mib=0, text_mib=1)


def allow_all(rig: Rig) -> None:
    """Without files of its own, a host's policy permits `sealed` alone."""
    for end in (rig.home, rig.away):
        directory = end.host.paths.config / "policy"
        directory.mkdir(exist_ok=True)
        (directory / "own.cedar").write_text('@id("any") permit (principal, action, resource);')


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    writing = find_qemu().tracks_dirty_pages_under_tcg
    workload = Workload(fill_mib=16, canary=CANARY, rewrite_kib_per_s=2000 if writing else 0, check_all=3, files=FILES)
    with make_rig(hardware=HARDWARE, workload=workload, settings=ALLOWED) as made:
        allow_all(made)
        yield made


def cached_pages() -> list[bytes]:
    """Some pages of files that are in the guest's page cache, each like no other."""
    files = [path.read_bytes() for path in chosen_files(FILES)]
    whole = sorted({data[at : at + PAGE] for data in files for at in range(0, len(data) - PAGE, PAGE)})
    return whole[:: len(whole) // 40]


def heard(recorder: Recorder, directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(directory.glob("*-forward.bin")))


@pytest.mark.parametrize(
    ("protection", "channels"),
    [("sealed", 2), ("selective", 0), ("selective", 2), ("hrt", 0), *((name, 2) for name in CODED)],
)
def test_a_writing_guest_arrives_and_the_wire_shows_what_is_said(
    rig: Rig, protection: str, channels: int, tmp_path: Path
) -> None:
    recorder = Recorder(tmp_path)
    attempt = rig.attempt(
        recorder,
        protection=protection,
        i_know_this_is_weak=protection != "sealed",
        multifd_channels=channels,
        reduce=False,  # of a compressed page its words cannot be seen; what is compressed depends on how busy the machine is
        downtime_limit_ms=10,  # what goes over at the switch-over is encrypted, and at this speed that could be all
    )
    rig.assert_arrived(attempt)
    for seen in (attempt.source, attempt.destination):
        assert seen is not None
        assert (seen.protection, seen.readable) == (protection, readable_words(protection))
    assert attempt.source.result is not None
    assert attempt.source.result.not_sent == NotSent()
    wire = heard(recorder, tmp_path)
    assert len(wire) > 16 << 20
    assert CANARY.encode() not in wire
    shown = sum(page in wire for page in cached_pages())
    assert shown == 0 if protection == "sealed" else shown > 20, shown
    assert (b"Linux version " in wire) == (protection != "sealed")
    for end in (rig.home, rig.away):
        said = receipt_words(end)
        assert said == (protection, readable_words(protection))


def receipt_words(end: AgentHost) -> tuple[str, str]:
    statement = receipts_in(end.host.paths.state / "receipts")[-1].statement
    assert statement is not None
    return statement.predicate.protection.name, statement.predicate.protection.readable


def test_with_the_older_qemu() -> None:
    older = all_qemus()[0]
    if older == find_qemu():
        pytest.skip("only one QEMU is here")
    # it loses dirty pages under TCG: a guest that does not write
    with make_rig(qemu=older, workload=Workload(fill_mib=16), settings=ALLOWED) as made:
        allow_all(made)
        made.assert_arrived(made.attempt(protection="hrt", i_know_this_is_weak=True))


def test_a_host_that_does_not_allow_it_refuses() -> None:
    with make_rig() as made:
        with pytest.raises(SealaneError) as raised:
            made.begin(protection="hrt", i_know_this_is_weak=True)
        assert raised.value.code == "protection.not-allowed"
        assert made.home.agent is not None
        made.home.agent.stop()
        (made.home.host.paths.config / AGENT_FILE).write_text(ALLOWED)
        made.home.start_agent()
        attempt = made.attempt(protection="hrt", i_know_this_is_weak=True)
        assert (attempt.source.state, attempt.code) == ("aborted", "check.protection"), attempt.source
        assert attempt.source.progress.bytes_wire == 0
        made.guest.wait_ticks(2)


def test_with_what_reduces_them(rig: Rig, tmp_path: Path) -> None:
    for protection in ("sealed", "hrt"):
        directory = tmp_path / protection
        directory.mkdir()
        recorder = Recorder(directory)
        rig.assert_arrived(rig.attempt(recorder, protection=protection, i_know_this_is_weak=True))
        assert CANARY.encode() not in heard(recorder, directory)


def test_weak_ones_are_refused_without_the_word(rig: Rig) -> None:
    for protection in WEAK:
        with rig.home.client() as client, pytest.raises(SealaneError) as raised:
            client.start_migration(
                MigrationRequest.model_validate({"vm": rig.guest.name, "host": rig.away.name, "protection": protection})
            )
        assert raised.value.code == "protection.weak"
        assert "READABLE" in raised.value.detail
    rig.assert_goes_on()
