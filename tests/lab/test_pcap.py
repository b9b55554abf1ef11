"""Captures: whole, disordered, cut, and hostile."""

import contextlib
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.errors import EvidenceError
from sealane.lab import capturefile
from sealane.lab import pcap as reader
from sealane.lab.pcap import conversations, read_capture
from tests.lab.rig import ACK, CLIENT, SERVER, SYN, SYN_ACK, block, cooked, pcap, pcapng, tagged, tcp, tcp6

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


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [2, 3, 6])
def test_what_wireshark_writes(order: str, kind: int) -> None:
    capture = pcapng(dialogue(), order=order, kind=kind)
    (found,) = conversations(capture)
    assert (found.forward.data, found.back.data) == (DATA, b"answer")
    (twice,) = conversations(capture + pcapng([tcp(SERVER, CLIENT, 12, b" more")], order="<"))
    assert twice.back.data == b"answer more"  # another section, in another order
    (cut,) = conversations(capture[:-50])  # within the statistics and the last packet
    assert cut.forward.data == DATA


def test_links_of_all_kinds() -> None:
    frames = dialogue()
    captures = [
        pcap([frame[14:] for frame in frames], link=link)  # raw IP
        for link in (12, 14, 101, 228)
    ]
    captures += [pcap([b"\x02\0\0\0" + frame[14:] for frame in frames], link=link) for link in (0, 108)]
    captures += [pcap([cooked(frame) for frame in frames], link=113), pcapng(map(cooked, frames), link=113)]
    captures += [pcap([frame[12:14] + bytes(18) + frame[14:] for frame in frames], link=276)]
    captures += [pcap([tagged(frame, 0x8100) for frame in frames])]
    captures += [pcap([tagged(frame, 0x88A8, 0x8100) for frame in frames])]
    for capture in captures:
        (found,) = conversations(capture)
        assert (found.forward.data, found.back.data) == (DATA, b"answer")
    for link in (147, 195, 0xFFFF):
        for capture in (pcap(frames, link=link), pcapng(frames, link=link)):
            with pytest.raises(EvidenceError, match=f"link type {link}"):
                conversations(capture)
    assert conversations(pcap([tagged(frames[3], *[0x8100] * 9)])) == []


@pytest.mark.parametrize(
    ("first", "extensions"),
    [
        (6, b""),
        (0, b"\x06\x00" + bytes(6)),
        (60, b"\x2b\x01" + bytes(14) + b"\x06\x00" + bytes(6)),  # destination options, then routing
        (51, b"\x06\x04" + bytes(22)),
        (44, b"\x06" + bytes(7)),  # a fragment that is the whole packet
    ],
)
def test_ipv6_with_what_may_stand_before_tcp(first: int, extensions: bytes) -> None:
    packets = [tcp6(9, flags=SYN, extensions=extensions, first=first)]
    packets += [tcp6(10 + at, DATA[at : at + 500], extensions=extensions, first=first) for at in range(0, 5000, 500)]
    (found,) = conversations(pcap(packets, link=101))
    assert (found.client[0], found.forward.data) == ("0000:0000:0000:0000:0000:0000:0000:0001", DATA[:5000])


@pytest.mark.parametrize(
    "extensions", [b"\x06\x00\x00\x01" + bytes(4), b"\x06\x00\x00\x08" + bytes(4), b"\x2c\x00" + bytes(6)]
)
def test_fragments_and_endless_headers_are_left_out(extensions: bytes) -> None:
    assert conversations(pcap([tcp6(1, DATA, extensions=extensions, first=44)], link=101)) == []


def test_ports_that_are_used_again() -> None:
    again = [tcp(CLIENT, SERVER, 500_000, flags=SYN), tcp(CLIENT, SERVER, 500_001, b"another connection")]
    again.insert(1, again[0])  # sent twice: the same connection
    first, second = conversations(pcap([*dialogue(), *again]))
    assert (first.forward.data, second.forward.data) == (DATA, b"another connection")


def test_packets_that_were_cut_leave_gaps() -> None:
    frames = [frame[:100] for frame in dialogue(size=200)]  # as tcpdump -s 100 does
    (found,) = conversations(pcap(frames))
    assert found.forward.gaps == len(DATA) // 200
    assert found.forward.data.startswith(DATA[:46])


def test_who_speaks_to_himself_is_heard_once() -> None:
    (found,) = conversations(pcap([tcp(CLIENT, CLIENT, 1, DATA)]))
    assert (found.forward.data, found.back.data) == (DATA, b"")


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "HELD_MAX", 20_000)
    assert len(conversations(pcap(dialogue(size=5000)))) == 1
    with pytest.raises(EvidenceError, match="--port"):
        conversations(pcap(dialogue(size=100)))  # as many bytes, in more pieces
    repeated = dialogue(size=5000)
    assert len(conversations(pcap([*repeated, *repeated[2:] * 20]))) == 1, "what came before is not kept again"
    monkeypatch.setattr(reader, "CONVERSATIONS_MAX", 3)
    with pytest.raises(EvidenceError, match="more than 3 connections"):
        conversations(pcap([tcp((CLIENT[0], port), SERVER, 1, flags=SYN) for port in range(1000, 1004)]))


def test_lengths_in_pcapng_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    section = pcapng([])[:28]
    for lie in (
        struct.pack("<II", 6, 1 << 31) + bytes(40),
        struct.pack("<II", 6, 4) + bytes(40),
        struct.pack("<II", 6, 33) + bytes(40),
        block("<", 6, struct.pack("<5I", 5, 0, 0, 4, 4) + b"none"),  # of an interface that nobody described
        block("<", 3, bytes(8)),
        block("<", 6, bytes(4)),
    ):
        with pytest.raises(EvidenceError, match="pcapng"):
            conversations(section + lie)
    with pytest.raises(EvidenceError, match="does not fit"):
        conversations(pcapng([]) + block("<", 6, struct.pack("<5I", 0, 0, 0, 9, 9) + b"none"))
    with pytest.raises(EvidenceError, match="no byte order"):
        conversations(b"\x0a\x0d\x0d\x0a" + bytes(40))
    monkeypatch.setattr(capturefile, "INTERFACES_MAX", 5)
    with pytest.raises(EvidenceError, match="more than 5 interfaces"):
        conversations(section + block("<", 1, bytes(8)) * 6)


@pytest.mark.parametrize("data", [b"", b"no capture at all, but long enough"])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(EvidenceError) as caught:
        read_capture(path)
    assert caught.value.code == "lab.capture"
    with pytest.raises(EvidenceError, match="no such file"):
        read_capture(tmp_path / "nothing")


def test_a_file_with_a_hole_ends_at_once(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(pcap(dialogue()))
    os.truncate(path, 1 << 40)
    with pytest.raises(EvidenceError, match="a packet of 0 bytes"):
        read_capture(path)


def test_only_files_are_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises(EvidenceError, match="no regular file"):
            read_capture(path)  # at once: nobody writes into the pipe
    with pytest.raises(EvidenceError, match="attaches to none"):
        read_capture(Path("lo"))


def test_an_announced_length_is_not_believed() -> None:
    capture = pcap([]) + struct.pack("<IIII", 0, 0, 1 << 31, 1 << 31)
    with pytest.raises(EvidenceError):
        conversations(capture)


@given(st.binary(max_size=400), st.integers(0, 3000), st.binary(max_size=8))
def test_any_bytes_give_connections_or_one_error(noise: bytes, at: int, patch: bytes) -> None:
    whole = bytearray(pcap(dialogue()))
    whole[at : at + len(patch)] = patch
    modern = bytearray(pcapng(dialogue(size=1000)))
    modern[at : at + len(patch)] = patch
    made = [pcap([bytes(12) + kind + noise]) for kind in (b"\x08\x00", b"\x86\xdd", b"\x81\x00")]
    made += [pcap([noise], link=link) for link in (0, 1, 101, 113, 276)]
    made += [
        pcap([first + noise], link=101) for first in (b"\x45", b"\x60\0\0\0\0\xff\x06\x40", b"\x60\0\0\0\0\xff\0\x40")
    ]
    made += [pcapng([])[:28] + noise, pcapng([]) + noise, pcapng([noise])]
    for data in (noise, *made, bytes(whole), bytes(modern)):
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
