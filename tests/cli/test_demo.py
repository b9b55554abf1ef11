"""How the demonstration judges what it saw, and what it says where it cannot begin."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from sealane.cli.output import Output, Settings
from sealane.testing import demo
from sealane.testing.console import ConsoleLog
from sealane.testing.demo import Interruption, checked_whole
from sealane.testing.demo_report import Report, conclude
from sealane.testing.problems import RigError
from tests.cli.conftest import Run

KEYS = {
    *("status", "total_ms", "downtime_ms", "bytes_wire", "kex_group", "cipher", "guest_alive", "source_stopped"),
    *("canary_on_wire", "canary_on_plain_wire", "qemu_version", "accel", "accel_reason", "network"),
    *("multifd_channels", "ticks", "capture", "verdict", "level", "receipt", "receipt_verified"),
}


def good(**changes: Any) -> Report:
    seen: dict[str, Any] = {
        "qemu_version": "10.0.2",
        "capture": "tcpdump",
        "total_ms": 1200.0,
        "downtime_ms": 71.0,
        "bytes_wire": 190_000_000,
        "ticks": 42,
        "ticks_after": 22,
        "guest_alive": True,
        "source_stopped": True,
        "memory_intact": True,
        "captured_bytes": 191_000_000,
        "canary_count": 0,
        "plain_captured_bytes": 191_000_000,
        "plain_canary_count": 26_000,
        "receipt_problems": [],
        "level": 3,
        "verdict": {"level": 3, "production_level": 1, "root": "TPM host-b (software)"},
    }
    return Report(**{**seen, **changes})


def test_all_checks_held(capsys: pytest.CaptureFixture[str]) -> None:
    report = good()
    assert conclude(report, Output(Settings())) == 0
    told = capsys.readouterr()
    assert "✗" not in told.out
    assert told.err == ""
    value = report.as_dict()
    assert set(value) >= KEYS
    assert value["status"] == "ok"
    assert value["canary_on_wire"] is False
    assert value["canary_on_plain_wire"] is True
    assert value["failed_checks"] == []


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"guest_alive": False}, ["guest_alive"]),
        ({"guest_alive": None}, ["guest_alive"]),
        ({"source_stopped": False}, ["source_stopped"]),
        ({"memory_intact": False}, ["memory_intact"]),
        ({"memory_intact": None}, ["memory_intact"]),
        ({"canary_count": 1}, ["canary_on_wire"]),
        ({"canary_count": None}, ["canary_on_wire"]),
        ({"plain_canary_count": 0}, ["canary_on_plain_wire"]),
        ({"plain_canary_count": None}, ["canary_on_plain_wire"]),
        ({"receipt_problems": ["host-a: receipt 1 is missing"]}, ["receipt_verified"]),
        ({"receipt_problems": None}, ["receipt_verified"]),
        ({"level": 1}, ["attested"]),
        ({"level": None, "verdict": None}, ["attested"]),
        # an absence in a capture that missed something proves nothing
        ({"captured_bytes": 100_000_000}, ["capture_whole", "canary_on_wire"]),
        ({"bytes_wire": 0}, ["capture_whole", "canary_on_wire"]),
    ],
)
def test_a_check_that_did_not_hold_fails_the_demonstration(
    changes: dict[str, Any], failed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = good(**changes)
    assert report.as_dict()["status"] == "failed"
    assert report.as_dict()["failed_checks"] == failed
    assert conclude(report, Output(Settings())) == 5
    told = capsys.readouterr()
    assert told.out.count("✗") == len(failed)
    assert "demo.failed" in told.err


def test_a_report_of_nothing_is_a_failed_one() -> None:
    assert Report().as_dict()["status"] == "failed"
    assert good(problem="interrupted").as_dict()["status"] == "failed"


def test_memory_is_not_asked_for_where_qemu_loses_it(capsys: pytest.CaptureFixture[str]) -> None:
    report = good(memory_checkable=False, memory_intact=None, qemu_version="7.2.22")
    assert conclude(report, Output(Settings())) == 0
    assert "not checked: QEMU 7.2.22" in capsys.readouterr().out


def test_only_a_check_begun_at_the_destination_counts(tmp_path: Path) -> None:
    console = tmp_path / "console.log"
    console.write_text("ck 39\nchecked 10 pages ok\ntick 40\n")
    assert not checked_whole(ConsoleLog(console).lines)
    console.write_text("ck 39\ntick 40\nchecked 10 pages ok\n")
    assert checked_whole(ConsoleLog(console).lines)


def test_what_is_missing_is_one_error_with_its_mend(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_qemu() -> None:
        raise RigError("the Debian package qemu-system-x86 cannot be fetched: no network")

    monkeypatch.setattr(demo, "find_qemu", find_qemu)
    report = tmp_path / "report.json"
    told = run("demo", "--network", "loopback", "--json", str(report))
    assert told.exit_code == 5
    assert told.stderr.count("demo.prerequisite") == 1
    assert "no network" in told.stderr
    assert "./run setup" in told.stderr
    value = json.loads(report.read_text())
    assert value["status"] == "failed"
    assert "no network" in value["problem"]


@pytest.mark.parametrize("arguments", [["--json", "/nowhere/at/all"], ["--qemu", "/nowhere/qemu"]])
def test_paths_are_looked_at_first(run: Run, arguments: list[str]) -> None:
    told = run("demo", *arguments)
    assert told.exit_code == 2
    assert "usage.argument" in told.stderr


def test_the_first_signal_interrupts_and_later_ones_leave_the_cleaning_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
    with Interruption() as interruption:
        interruption.settle()
        os.kill(os.getpid(), signal.SIGINT)
