"""`sealane lab` on capture files: what it tells, and how it exits."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard

from sealane.lab.impostor import preface
from sealane.seal.codecs import Hrt
from tests.cli.conftest import Run
from tests.lab.rig import ACK, CLIENT, SERVER, SYN, memory, pcap, pcapng, tcp

PLAIN = Path(__file__).parents[1] / "captures" / "single-q35-10.0.2" / "0-main.zst"
PIECE = 60_000


def capture(path: Path, flow: bytes) -> Path:
    """The flow as tcpdump would have caught it."""
    frames = [tcp(CLIENT, SERVER, 1, flags=SYN)]
    frames += [tcp(CLIENT, SERVER, 2 + at, flow[at : at + PIECE], flags=ACK) for at in range(0, len(flow), PIECE)]
    path.write_bytes(pcap(frames))
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flow = zstandard.ZstdDecompressor().decompressobj().decompress(PLAIN.read_bytes())
    return capture(tmp_path_factory.mktemp("lab") / "plain.pcap", flow)


@pytest.fixture(scope="module")
def lane(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lane under hrt, with pages encoded as Sealane does; tags and ciphertext are zeros here, which no attacker reads."""
    pages = memory()
    out = np.empty_like(pages)
    Hrt(bytes(32)).encode_into(pages, out)
    flow = preface(kind=2)
    for page in out:
        payload = struct.pack(">I", 1 << 30) + page.tobytes()
        flow += struct.pack(">BBHIQ8s", 2, 2, 1, len(payload), 0, bytes(8)) + payload + bytes(16)
    return capture(tmp_path_factory.mktemp("lab") / "lane.pcap", flow)


def test_sniff(run: Run, plain: Path, tmp_path: Path) -> None:
    told = run("lab", "sniff", str(plain), "--write", str(tmp_path / "flows"), "--json")
    assert told.exit_code == 0, told.stderr
    said = json.loads(told.stdout)
    assert [each["kind"] for each in said["connections"]] == ["QEMU main channel, in clear"]
    assert said["memory_blocks"]["pc.ram"]
    written = (tmp_path / "flows" / "0-forward.bin").read_bytes()
    assert written == zstandard.ZstdDecompressor().decompressobj().decompress(PLAIN.read_bytes())
    assert run("lab", "sniff", str(plain), "--port", "1", "--json").exit_code == 0


def test_carve(run: Run, plain: Path, tmp_path: Path) -> None:
    told = run("lab", "carve", str(plain), "--find", "SeaBIOS", "--memory", str(tmp_path / "pages"))
    assert told.exit_code == 0, told.stderr
    assert "'SeaBIOS': memory pc." in told.stdout
    assert (tmp_path / "pages" / "pc.ram.bin").stat().st_size % 4096 == 0


def test_break(run: Run, lane: Path, tmp_path: Path) -> None:
    told = run("lab", "break", str(lane), "--pages", str(tmp_path / "decoded.bin"), "--json")
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["codec"] == "hrt"
    assert (tmp_path / "decoded.bin").read_bytes() == memory().tobytes()


def test_nothing_to_break(run: Run, plain: Path) -> None:
    told = run("lab", "break", str(plain))
    assert told.exit_code == 1
    assert "no key was recovered" in told.stdout


def test_no_capture(run: Run, tmp_path: Path) -> None:
    for command in ("sniff", "carve", "break"):
        told = run("lab", command, str(tmp_path / "nothing.pcap"))
        assert told.exit_code == 2
        assert "lab.capture" in told.stderr


def test_no_network_is_attached_to(run: Run) -> None:
    told = run("lab", "sniff", "lo")
    assert told.exit_code == 2
    assert "attaches to none" in told.stderr
    assert "lab.capture" in told.stderr
    told = run("lab", "carve", "/dev/null", "--json")
    assert told.exit_code == 2
    assert json.loads(told.stdout)["code"] == "lab.capture"


def test_help_teaches(run: Run) -> None:
    told = run("lab", "--help").stdout
    for wanted in ("sniff [CAPTURE]", "planted secrets", "attaches to no network", "sealane lab carve --way all"):
        assert wanted in told.replace("\n", " ") or wanted in told
    for command in (
        "sniff",
        "carve",
        "break",
        "leak",
        "tamper",
        "truncate",
        "replay",
        "redirect",
        "flood",
        "downgrade",
    ):
        text = run("lab", command, "--help").stdout
        assert f"sealane lab {command}" in text.partition("Example")[2], command


def test_what_wireshark_wrote(run: Run, plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "wire.pcapng"
    flow = zstandard.ZstdDecompressor().decompressobj().decompress(PLAIN.read_bytes())
    frames = [tcp(CLIENT, SERVER, 2 + at, flow[at : at + PIECE]) for at in range(0, len(flow), PIECE)]
    path.write_bytes(pcapng([tcp(CLIENT, SERVER, 1, flags=SYN), *frames]))
    same = [json.loads(run("lab", "sniff", str(each), "--json").stdout)["memory_blocks"] for each in (path, plain)]
    assert same[0] == same[1]


def test_unknown_ways(run: Run) -> None:
    assert run("lab", "leak", "nothing").exit_code == 2
    assert run("lab", "tamper", "--way", "nothing").exit_code == 2
