"""Attacks on the attested handshake, live: one of two real agents with software TPMs lies, and nothing moves.

After each attack: refused with its own code before a page was sent, the VM runs on, and a receipt at either end, each
verified, names the reason, the VM, the peer and, where this end judged, its verdict.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sealane.testing.attested import AttestedHosts
from sealane.testing.malice import LIES
from sealane.testing.pair import PROGRAM
from sealane.testing.qemu import find_qemu
from tests.e2e.refusals import assert_refused
from tests.e2e.rig import Rig, make_rig

pytestmark = pytest.mark.e2e

QEMU = find_qemu()
# Each lie, and what it is refused with.
CODES = {
    "stale-nonce": "attest.nonce",
    "swapped-role": "attest.role",
    "another-migration": "attest.migration",
    "swapped-seeds": "attest.binding",
    "reflection": "attest.role",
    "quoted-for-another-migration": "attest.binding",
    "replayed-quote": "attest.binding",
    "another-channel": "attest.binding",
    "boot-log": "attest.log-replay",
}
# What a verdict refuses; the other messages are refused before evidence is looked at.
JUDGED = {"quoted-for-another-migration", "replayed-quote", "another-channel", "boot-log"}


@pytest.fixture(scope="module")
def lie_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("malice") / "lie"
    path.write_text("")
    return path


@pytest.fixture(scope="module")
def rig(lie_file: Path) -> Iterator[Rig]:
    """The first host is honest, the second lies when it is told to; either may be the source."""
    program = (sys.executable, "-m", "sealane.testing.malice", str(lie_file), "sealane.cli")
    with make_rig(qemu=QEMU, settings=AttestedHosts([QEMU.path.resolve()]), program=[PROGRAM, program]) as made:
        made.assert_arrived(made.attempt())  # all is well while nobody lies; replays have something to replay
        yield made


def test_every_lie_has_its_code() -> None:
    assert set(CODES) == set(LIES)


@pytest.mark.parametrize("lie", sorted(CODES))
@pytest.mark.parametrize("liar", ["source", "destination"])
def test_a_lie(rig: Rig, lie_file: Path, lie: str, liar: str) -> None:
    if (rig.home is rig.pair.b) != (liar == "source"):
        rig.assert_arrived(rig.attempt())
    lie_file.write_text(lie)
    try:
        attempt = rig.attempt()
    finally:
        lie_file.write_text("")
    judge = rig.pair.a if lie in JUDGED else None
    # who reflects has not moved on, and may meet the honest host's next message before its refusal
    assert_refused(rig, attempt, CODES[lie], judge, liar=rig.pair.b, own="attest.order" if lie == "reflection" else "")
