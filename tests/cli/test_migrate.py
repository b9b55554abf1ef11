"""`sealane migrate` against a stand-in agent: what it says of where the VM runs, and what it exits with."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import sealane
from sealane.cli import migrate as migrate_command
from sealane.cli.screen import fitting
from sealane.errors import CATALOGUE, family_of, make_error
from sealane.host.models import NotSent, Progress
from tests.cli.conftest import Run, Spawn
from tests.cli.stand_in import CHANNEL, StandIn, completed, copying, failed, state


def first_line(text: str) -> str:
    return text.splitlines()[0]


def test_success_says_where_and_what_it_took(agent: StandIn, run: Run) -> None:
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 0, result.output
    last = result.stdout.splitlines()[-1]
    assert last.startswith("✓ web01 runs on host-b")
    for part in ("total 4.8 s", "31 ms down", "4.1 GB on the wire", "X25519MLKEM768", "AES-256-GCM"):
        assert part in last
    assert result.stderr == ""


def test_pipe_gets_one_plain_line_per_stage(agent: StandIn, run: Run) -> None:
    lines = run("migrate", "web01", "host-b").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["prepare", "channel", "copy", "switch", "hand-over", "✓"]
    assert "\x1b" not in "".join(lines)
    assert "\r" not in "".join(lines)


def test_pipe_tells_progress_every_few_seconds(agent: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealane.cli.screen.Screen.interval_s", 0.0)
    agent.script = [copying(), copying(), completed()]
    lines = [line for line in run("migrate", "web01", "host-b").stdout.splitlines() if line.startswith("copy")]
    assert len(lines) == 2
    for part in ("71 %", "2.8 GiB of 4 GiB", "2.9 GB sent", "9.4 Gb/s", "iteration 2", "dirty 210 Mb/s", "3 s left"):
        assert part in lines[0]


def test_quiet_success_is_silent(agent: StandIn, run: Run) -> None:
    assert run("migrate", "web01", "host-b", "-q").output == ""


def test_options_reach_the_agent(agent: StandIn, run: Run) -> None:
    options = (
        "--multifd",
        "4",
        "--max-bandwidth",
        "10Gb/s",
        "--downtime-limit",
        "50",
        "--switchover-hook",
        "sync 'a b'",
        "--no-reduce",
    )
    assert run("migrate", "web01", "host-b", *options).exit_code == 0
    (request,) = agent.requests
    assert request.multifd_channels == 4
    assert request.max_bandwidth_bytes_per_s == 1_250_000_000
    assert request.downtime_limit_ms == 50
    assert request.switchover_hook == ["sync", "a b"]
    assert request.reduce is False


def test_what_was_not_sent_is_told_with_its_reasons(agent: StandIn, run: Run) -> None:
    end = completed()
    assert end.migration.result is not None
    saved = NotSent(zero_bytes=900_000_000, same_bytes=400_000_000, zstd_bytes=300_000_000)
    result = end.migration.result.model_copy(update={"not_sent": saved})
    agent.script = [
        copying(),
        end.model_copy(update={"migration": end.migration.model_copy(update={"result": result})}),
    ]
    line = run("migrate", "web01", "host-b").stdout.splitlines()[-1]
    assert "1.6 GB not sent (zero 900 MB, same 400 MB, zstd 300 MB)" in line
    assert agent.requests[0].reduce is True


def test_no_multifd_is_zero_channels(agent: StandIn, run: Run) -> None:
    run("migrate", "web01", "host-b", "--no-multifd")
    assert agent.requests[0].multifd_channels == 0
    assert run("migrate", "web01", "host-b", "--no-multifd", "--multifd", "2").exit_code == 2


def test_disks_are_told_apart(agent: StandIn, run: Run) -> None:
    disks: dict[str, Any] = {
        "disk_bytes_total": 8 << 30,
        "disk_bytes_transferred": 2 << 30,
        "disk_bytes_remaining": 6 << 30,
    }
    agent.script = [copying(progress=Progress(bytes_wire=2 << 30, **disks)), completed()]
    result = run("migrate", "web01", "host-b", "--copy-storage", "inc")
    assert agent.requests[0].copy_storage == "inc"
    assert "25 %" in result.stdout
    assert "2 GiB of 8 GiB of disks" in result.stdout
    assert run("migrate", "web01", "host-b", "--copy-storage", "some").exit_code == 2


def test_refused_before_anything_moved(agent: StandIn, run: Run) -> None:
    agent.script = [state("preparing"), failed("check.memory", progress=Progress())]
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 6
    assert first_line(result.stderr).startswith("✗ refused before anything moved; web01 still runs here ")
    assert first_line(result.stderr).endswith(" check.memory")
    assert "Mend: launch the destination with the source's -m" in result.stderr
    assert "✓" not in result.output


def test_refused_by_the_agent_at_once(agent: StandIn, run: Run) -> None:
    agent.refusal = make_error("trust.unknown", "no host-c is trusted here")
    result = run("migrate", "web01", "host-c")
    assert result.exit_code == 6
    lines = result.stderr.splitlines()
    assert lines[0].startswith("✗ refused before anything moved; web01 still runs here")
    assert lines[0].endswith("trust.unknown")
    assert lines[1:] == ["  no host-c is trusted here", f"  Mend: {CATALOGUE['trust.unknown'].mend}"]


def test_aborted_mid_copy(agent: StandIn, run: Run) -> None:
    agent.script = [state("preparing"), copying(), failed("lane.integrity")]
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 3
    assert first_line(result.stderr).startswith("✗ aborted at 71 %; web01 still runs here")
    assert first_line(result.stderr).endswith("lane.integrity")


def test_in_doubt(agent: StandIn, run: Run) -> None:
    doubt = failed("handover.in-doubt", state="in-doubt", runs_at="in-doubt")
    agent.script = [copying(), state("in-doubt", runs_at="in-doubt"), doubt]
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 7
    assert first_line(result.stderr).startswith("? in doubt: web01 is paused here and may run on host-b")
    assert first_line(result.stderr).endswith("handover.in-doubt")


def test_completed_elsewhere_than_the_destination_is_no_success(agent: StandIn, run: Run) -> None:
    end = completed()
    odd = end.migration.model_copy(update={"runs_at": "in-doubt"})
    agent.script = [end.model_copy(update={"migration": odd})]
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 7
    assert "✓" not in result.output


def test_agent_gone_mid_stream_claims_nothing(agent: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate_command, "REATTACH_PAUSE_S", 0.01)
    agent.script = [copying(), "die"]
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 6
    assert first_line(result.stderr).startswith("? unknown at 71 %: web01 may run here or on host-b")
    assert first_line(result.stderr).endswith("agent.unreachable")
    assert "may go on without this command" in result.stderr
    assert "sealane status web01" in result.stderr
    assert "✓" not in result.output


def test_broken_stream_is_taken_up_again(agent: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate_command, "REATTACH_PAUSE_S", 0.01)
    agent.script = [copying(), "cut", copying(), completed()]
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 0, result.output
    assert "following on" in result.stdout


def test_agent_restarted_reports_the_outcome(agent: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate_command, "REATTACH_PAUSE_S", 0.01)
    agent.script = [copying(), "cut", failed("agent.restarted")]
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 6
    assert first_line(result.stderr).endswith("agent.restarted")


def test_no_agent(run: Run) -> None:
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 6
    assert first_line(result.stderr).startswith("✗ nothing was begun; web01 is where it was")
    assert first_line(result.stderr).endswith("agent.unreachable")


def test_refused_connection(run: Run, agent: StandIn) -> None:
    agent.__exit__()
    agent.run.mkdir()
    agent.path.touch()
    result = run("migrate", "web01", "host-b")
    assert result.exit_code == 6
    assert "does not accept connections" in result.stderr


def test_detach(agent: StandIn, run: Run) -> None:
    result = run("migrate", "web01", "host-b", "--detach")
    assert result.exit_code == 0
    assert "sealane status web01" in result.stdout
    assert "✓" not in result.stdout


@pytest.mark.parametrize(
    "code", ["usage.argument", "lane.cut", "vm.qmp", "check.cpus", "handover.in-doubt", "internal.error"]
)
def test_exit_status_of_every_family(agent: StandIn, run: Run, code: str) -> None:
    agent.script = [copying(), failed(code)]
    assert run("migrate", "web01", "host-b").exit_code == family_of(code).exit_status
    agent.refusal = make_error(code)
    assert run("migrate", "web01", "host-b").exit_code == family_of(code).exit_status


def test_json_is_one_object_a_line(agent: StandIn, run: Run) -> None:
    result = run("migrate", "web01", "host-b", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["type"] for line in lines] == ["state"] * 3 + ["progress"] + ["state"] * 2 + ["end"]
    assert lines[-1]["migration"]["result"]["downtime_ms"] == 31.4
    assert result.stderr == ""


def test_json_error_is_one_object(agent: StandIn, run: Run) -> None:
    agent.script = [copying(), failed("lane.integrity")]
    result = run("--json", "migrate", "web01", "host-b")
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["type"] == "error"
    assert last["code"] == "lane.integrity"
    assert last["exit_status"] == result.exit_code == 3
    assert last["runs_at"] == "source"
    assert result.stderr == ""


def test_ctrl_c_cancels_and_waits(agent: StandIn, spawn: Spawn) -> None:
    agent.script = [copying(), "wait-cancel", "pause", failed("migration.cancelled")]
    process = spawn("migrate", "web01", "host-b")
    wait_for_line(process, "copy")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert agent.cancels == 1
    assert "cancelling" in out
    assert first_line(err).startswith("✗ cancelled at 71 %; web01 still runs here")
    assert process.returncode == 6


def test_ctrl_c_too_late_goes_on(agent: StandIn, spawn: Spawn) -> None:
    agent.cancel_refusal = make_error("migration.too-late")
    agent.script = [copying(), "pause", "pause", "pause", completed()]
    process = spawn("migrate", "web01", "host-b")
    wait_for_line(process, "copy")
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert "migration.too-late" in out
    assert out.splitlines()[-1].startswith("✓ web01 runs on host-b")
    assert process.returncode == 0


def test_second_ctrl_c_detaches(agent: StandIn, spawn: Spawn) -> None:
    agent.cancel_refusal = make_error("migration.too-late")
    agent.script = [copying(), "wait-cancel", completed()]
    process = spawn("migrate", "web01", "host-b")
    wait_for_line(process, "copy")
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "not cancelled")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "left to the agent" in err
    assert "✓" not in out


def wait_for_line(process: "subprocess.Popen[str]", start: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(f"no line began with {start!r}")


def on_a_terminal(*arguments: str, **environment: str) -> tuple[str, int]:
    """Run the command with its output on a pseudo-terminal of 120 columns."""
    ours, theirs = pty.openpty()
    source = str(Path(sealane.__file__).parents[1])
    settings = {**os.environ, "PYTHONPATH": source, "TERM": "xterm", "COLUMNS": "120", "LINES": "30", **environment}
    process = subprocess.Popen(
        [sys.executable, "-m", "sealane.cli", *arguments], stdout=theirs, stderr=theirs, stdin=theirs, env=settings
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    os.close(ours)
    return shown.decode(), process.wait(timeout=20)


def test_terminal_gets_a_bar_and_colour(agent: StandIn) -> None:
    agent.script = [state("preparing"), copying(), "pause", state("switching-over", **CHANNEL), completed()]
    shown, status = on_a_terminal("migrate", "web01", "host-b")
    assert status == 0
    assert "━" in shown
    assert "71 %" in shown
    assert "\x1b[32m✓\x1b[0m web01 runs on host-b" in shown


def test_terminal_without_colour(agent: StandIn) -> None:
    agent.script = [copying(), "pause", failed("lane.cut")]
    shown, status = on_a_terminal("migrate", "web01", "host-b", NO_COLOR="1")
    assert status == 3
    assert "✗ aborted at 71 %" in shown
    assert "\x1b[31m" not in shown


@pytest.mark.parametrize(
    ("code", "place"), [("vm.unreachable", "web01 does not answer here"), ("vm.not-running", "web01 was not touched")]
)
def test_never_says_that_a_vm_runs_which_nobody_could_ask(agent: StandIn, run: Run, code: str, place: str) -> None:
    agent.script = [failed(code, progress=Progress())]
    result = run("migrate", "web01", "host-b")
    assert first_line(result.stderr).startswith(f"✗ refused before anything moved; {place}")
    assert "still runs" not in result.output


def test_answer_that_does_not_fit_is_no_success(agent: StandIn, run: Run) -> None:
    odd = agent.vms["web01"].model_copy(update={"state": "bogus"})
    agent.vms["web01"] = odd
    result = run("vm", "list")
    assert result.exit_code == 70
    assert "does not fit" in result.stderr


def test_json_refusal_is_one_object(agent: StandIn, run: Run) -> None:
    agent.refusal = make_error("vm.busy")
    (line,) = run("migrate", "web01", "host-b", "--json").stdout.splitlines()
    assert json.loads(line)["code"] == "vm.busy"
    assert "web01 still runs here" in json.loads(line)["headline"]


def test_narrow_terminals_lose_the_least_figures_first() -> None:
    moving = copying().migration
    assert fitting(moving, 200).split("   ")[2] == "2.9 GB sent"
    for width in (80, 60, 40, 20):
        text = fitting(moving, width)
        assert len(text) <= width
        assert text.startswith("71 %")
        assert text.endswith("3 s left")


def test_leaving_while_in_doubt_says_in_doubt(agent: StandIn, spawn: Spawn) -> None:
    agent.cancel_refusal = make_error("migration.too-late")
    agent.script = [copying(), state("in-doubt", runs_at="in-doubt"), "wait-cancel", completed()]
    process = spawn("migrate", "web01", "host-b")
    wait_for_line(process, "? in doubt")
    process.send_signal(signal.SIGINT)
    wait_for_line(process, "not cancelled")
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 7
    assert first_line(err).startswith("? in doubt: web01 is paused here and may run on host-b")
