"""Captures: whole, disordered, cut, and hostile."""

import contextlib
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import EvidenceError
from sealane.lab.pcap import conversations, read_capture
from tests.lab.rig import ACK, CLIENT, SERVER, SYN, SYN_ACK, pcap, tcp

DATA = bytes(range(256)) * 40


def dialogue(sequence: int = 1000, size: int = 100) -> list[bytes]:
    frames = [tcp(CLIENT, SERVER, sequence, flags=SYN), tcp(SERVER, CLIENT, 5, flags=SYN_ACK)]
    frames += [tcp(CLIENT, SERVER, sequence + 1 + at, DATA[at : at + size]) for at in range(0, len(DATA), size)]
    return [*frames, tcp(SERVER, CLIENT, 6, b"answer")]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("sequence", [1000, (1 << 32) - 500])  # the second one wraps in its middle
def test_a_connection_is_put_together(order: str, sequence: int) -> None:
    (found,) = conversations(pcap(dialogue(sequence), order=order))
    assert (found.client, found.server) == (CLIENT, SERVER)
    assert (found.forward.data, found.forward.gaps) == (DATA, 0)
    assert found.back.data == b"answer"


def test_disorder_repeats_and_overlaps_do_not_matter() -> None:
    frames = dialogue()
    frames += [tcp(CLIENT, SERVER, 1001 + at, DATA[at : at + 333]) for at in range(0, 2000, 150)]
    opening, rest = frames[:2], frames[2:]
    random.Random(5).shuffle(rest)
    (found,) = conversations(pcap([*opening, *rest]))
    assert (found.forward.data, found.forward.gaps) == (DATA, 0)


def test_what_is_missing_is_a_gap() -> None:
    frames = dialogue()
    del frames[7]
    (found,) = conversations(pcap(frames))
    assert (found.forward.data, found.forward.gaps) == (DATA[:500] + DATA[600:], 1)


def test_only_the_port_that_is_wanted() -> None:
    other = [tcp(("10.0.0.3", 1), ("10.0.0.4", 80), 1, b"other")]
    assert len(conversations(pcap([*dialogue(), *other]))) == 2
    assert len(conversations(pcap([*dialogue(), *other]), port=SERVER[1])) == 1


def test_the_answer_first_does_not_exchange_the_ends() -> None:
    (found,) = conversations(pcap([tcp(SERVER, CLIENT, 5, flags=SYN_ACK), tcp(CLIENT, SERVER, 1, b"x", flags=ACK)]))
    assert (found.client, found.server) == (CLIENT, SERVER)


@pytest.mark.parametrize("data", [b"", b"no capture at all, but long enough", b"\x0a\x0d\x0d\x0a" + bytes(40)])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(EvidenceError) as caught:
        read_capture(path)
    assert caught.value.code == "lab.capture"
    with pytest.raises(EvidenceError):
        read_capture(tmp_path / "nothing")


def test_an_announced_length_is_not_believed() -> None:
    capture = pcap([]) + struct.pack("<IIII", 0, 0, 1 << 31, 1 << 31)
    with pytest.raises(EvidenceError):
        conversations(capture)


@given(st.binary(max_size=400), st.integers(0, 3000), st.binary(max_size=8))
def test_any_bytes_give_connections_or_one_error(noise: bytes, at: int, patch: bytes) -> None:
    whole = bytearray(pcap(dialogue()))
    whole[at : at + len(patch)] = patch
    for data in (noise, pcap([noise]), pcap([bytes(12) + b"\x08\x00" + noise]), bytes(whole)):
        with contextlib.suppress(EvidenceError):
            found = conversations(data)
            assert sum(len(each.forward.data) + len(each.back.data) for each in found) <= len(data)


@pytest.mark.skipif(not (shutil.which("tcpdump") or Path("/usr/sbin/tcpdump").exists()), reason="tcpdump is not here")
def test_tcpdump_reads_the_captures_of_these_tests(tmp_path: Path) -> None:
    """That the frames made here are TCP as others understand it."""
    path = tmp_path / "made.pcap"
    path.write_bytes(pcap(dialogue()))
    tool = shutil.which("tcpdump") or "/usr/sbin/tcpdump"
    told = subprocess.run([tool, "-nr", path], capture_output=True, text=True, check=True, timeout=20).stdout
    assert f"IP 10.0.0.1.40000 > 10.0.0.2.{SERVER[1]}: Flags [S]" in told
