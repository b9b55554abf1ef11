"""`sealane debug explain-stream`: what people and programs are told about recorded streams."""

import json
from pathlib import Path

import pytest
import zstandard

from tests.cli.conftest import Run
from tests.wire.rig import CAPTURES, connections, main_stream, provenance


def files(name: str) -> list[str]:
    return [str(path) for path in sorted((CAPTURES / name).glob("*.zst"))]


@pytest.mark.parametrize(
    "name", ["single-q35-7.2.22", "multifd-zstd-7.2.22", "multifd-running-10.0.2", "postcopy-preempt-10.0.2"]
)
def test_the_digests_are_the_source_s(run: Run, name: str) -> None:
    told = run("debug", "explain-stream", *files(name), "--ram-digest", "--json")
    assert told.exit_code == 0, told.output
    facts = json.loads(told.stdout)
    digests = {block["name"]: block["sha256"] for block in facts["blocks"]}
    for block, truth in provenance(name)["blocks"].items():
        assert digests[block] == truth["sha256"]
    kinds = [one["kind"] for one in facts["files"]]
    assert kinds[0] == "main"
    assert set(kinds) <= {"main", "multifd", "preempt", "return path"}
    assert facts["error"] is None
    assert [one["bytes"] for one in facts["files"]] == [
        facts_of["length"] for _, facts_of in sorted(provenance(name)["files"].items())
    ]


def test_text_tells_the_same(run: Run) -> None:
    told = run("debug", "explain-stream", *files("multifd-old-type-10.0.2"), "--ram-digest")
    assert told.exit_code == 0, told.output
    assert "pc-q35-7.2" in told.stdout
    assert "channel 0:" in told.stdout
    assert "channel 1:" in told.stdout
    assert provenance("multifd-old-type-10.0.2")["blocks"]["pc.ram"]["sha256"] in told.stdout
    assert "devices: 30 with" in told.stdout
    assert "section 1 ram: 1 START" in told.stdout


def test_the_order_of_channels_does_not_matter(run: Run) -> None:
    main, one, two, back = files("multifd-running-10.0.2")
    told = [
        json.loads(run("debug", "explain-stream", *order, "--ram-digest", "--json").stdout)["blocks"]
        for order in ([main, one, two, back], [main, back, two, one])
    ]
    assert told[0] == told[1]


def test_plain_files_and_no_digest(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "main.bin"
    path.write_bytes(connections("single-q35-10.0.2")[0])
    facts = json.loads(run("debug", "explain-stream", str(path), "--json").stdout)
    assert facts["pages"]["normal"] > 300
    assert "sha256" not in facts["blocks"][0]
    shared = run("debug", "explain-stream", *files("ignore-shared-10.0.2"), "--ram-digest")
    assert "no page of it was sent" in shared.stdout


def test_a_broken_stream_is_told_as_far_as_it_goes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "main.bin"
    path.write_bytes(main_stream()[:6000])
    told = run("debug", "explain-stream", str(path))
    assert told.exit_code == 3
    assert "machine     pc-q35" in told.stdout
    assert "wire.truncated" in told.stderr
    lines = run("debug", "explain-stream", str(path), "--json").stdout.splitlines()
    assert json.loads(lines[0])["error"]["section"] == "ram"
    assert json.loads(lines[1])["code"] == "wire.truncated"


@pytest.mark.parametrize(
    ("content", "status", "word"),
    [
        (b"", 0, "empty"),
        (b"abc", 0, "cut short"),
        (b"no stream at all", 3, "wire.malformed"),
        (None, 2, "No such file"),
    ],
)
def test_files_that_are_no_streams(run: Run, tmp_path: Path, content: bytes | None, status: int, word: str) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    told = run("debug", "explain-stream", str(path))
    assert told.exit_code == status
    assert word in told.output
    broken = tmp_path / "y"
    broken.write_bytes(zstandard.compress(bytes(100))[:4] + b"\xff" * 40)
    assert run("debug", "explain-stream", str(broken)).exit_code == 2


def test_two_main_channels_are_misuse(run: Run) -> None:
    main = files("single-q35-7.2.22")[0]
    assert run("debug", "explain-stream", main, main).exit_code == 2
