"""`sealane demo` as a user runs it, with real QEMU: it ends well, and it ends clean."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest

from sealane.testing.hosts import namespaces_work

pytestmark = pytest.mark.e2e

NETWORKS = [
    "loopback",
    pytest.param("netns", marks=pytest.mark.skipif(not namespaces_work(), reason="no network namespaces here")),
]
LIMIT_S = 90


@dataclass
class Demo:
    """A running `sealane demo`; all that it starts carries a mark in its environment."""

    process: "subprocess.Popen[bytes]"
    mark: bytes
    said: str = ""

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while text not in self.said:
            assert self._read(deadline - time.monotonic()), self.said

    def wait(self, timeout_s: float) -> int:
        """Its exit status, when it has said everything."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            pass
        return self.process.wait(max(1.0, deadline - time.monotonic()))

    def _read(self, timeout_s: float) -> str:
        """What it says next; nothing at its end, and where it stays silent. Unbuffered, or select(2) would miss it."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], max(0.0, timeout_s))[0]:
            return ""
        text = os.read(self.process.stdout.fileno(), 65_536).decode(errors="replace")
        self.said += text
        return text

    def environments(self) -> Iterator[bytes]:
        """Of every process that it started and that is alive, itself among them."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes()
            except OSError:
                continue
            if self.mark in environment:
                yield environment

    def directories(self) -> set[Path]:
        """The temporary directories of its hosts."""
        found = b"".join(self.environments())
        return {Path(name.decode()) for name in re.findall(rb"=(/tmp/sl-[^/\0]+)/host-", found)}


Start = Callable[..., Demo]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[Demo] = []

    def demo(*arguments: str) -> Demo:
        mark = f"SEALANE_TEST_MARK={uuid4().hex}"
        name, _, value = mark.partition("=")
        process = subprocess.Popen(
            [sys.executable, "-m", "sealane.cli", "demo", *arguments],
            env={**os.environ, name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(Demo(process, mark.encode()))
        return started[-1]

    yield demo
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("network", NETWORKS)
def test_the_demonstration_holds(start: Start, network: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    demo = start("--network", network, "--json", str(file), "--multifd", "2")
    demo.wait_for("run        host-a#")
    directories = demo.directories()
    assert demo.wait(LIMIT_S) == 0, demo.said
    report = json.loads(file.read_text())
    assert report["status"] == "ok"
    assert report["network"] == network
    assert report["guest_alive"] is True
    assert report["source_stopped"] is True
    assert report["canary_on_wire"] is False
    assert report["canary_on_plain_wire"] is True
    assert report["receipt_verified"] is True
    assert report["receipt"]["payloadType"] == "application/vnd.in-toto+json"
    assert report["kex_group"] == "X25519MLKEM768"
    assert report["cipher"] == "AES-256-GCM"
    assert report["multifd_channels"] == 2
    assert report["capture"] in {"tcpdump", "relay"}
    assert report["accel"] in {"kvm", "tcg"}
    assert 0 < report["downtime_ms"] < report["total_ms"]
    assert report["captured_bytes"] >= report["bytes_wire"] > 0
    assert report["level"] == 3
    assert "(software)" in report["verdict"]["root"]
    assert report["verdict"]["level"] == 3
    assert "\x1b" not in demo.said
    assert_clean(demo, directories)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("stage", ["guest      Linux boots", "copy       ", "contrast   moves"])
def test_interrupted_it_leaves_nothing(start: Start, network: str, stage: str, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    demo = start("--network", network, "--json", str(file))
    demo.wait_for(stage)
    directories = demo.directories()
    assert len(directories) == 1
    demo.process.send_signal(signal.SIGINT)
    assert demo.wait(30) == 130, demo.said
    assert "interrupted" in demo.said
    assert "Traceback" not in demo.said
    assert json.loads(file.read_text())["status"] == "failed"
    assert_clean(demo, directories)


def assert_clean(demo: Demo, directories: set[Path]) -> None:
    assert list(demo.environments()) == []
    assert not any(path.exists() for path in directories)
