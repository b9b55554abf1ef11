"""`sealane vtpm`, and what the doctor says of swtpm: what is shown, given as JSON, and how to go on."""

import json
from pathlib import Path
from typing import Any

import pytest

from sealane.cli.client import AgentClient
from sealane.errors import make_error
from sealane.host.models import VtpmFacts, VtpmView
from sealane.paths import Paths
from sealane.vtpm.record import KeyReference, Record, Records
from tests.cli.conftest import Run
from tests.cli.stand_in import StandIn

VIEW = VtpmView(
    vm="web01",
    storage="/var/lib/vtpm",
    control="/run/sealane/vtpm/web01.sock",
    swtpm="0.7.1",
    status="here",
    running=True,
    in_use=False,
    migrating=False,
    key="a key file",
    facts=VtpmFacts(ek_sha256="e" * 64, version=3, counter=2),
    epoch=1,
)

RECORD = Record(vm="web01", status="here", epoch=1, key=KeyReference("file", 1), storage="/s", directory="d")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the agent was asked for."""
    found: list[Any] = []

    def start(_client: AgentClient, name: str, **wishes: bool) -> VtpmView:
        found.append((name, {wish for wish, wanted in wishes.items() if wanted}))
        return VIEW

    def change(_client: AgentClient, name: str, what: str) -> VtpmView:
        found.append((name, what))
        return VIEW

    monkeypatch.setattr(AgentClient, "start_vtpm", start)
    monkeypatch.setattr(AgentClient, "change_vtpm", change)
    monkeypatch.setattr(AgentClient, "vtpm", lambda _client, _name: VIEW)
    return found


@pytest.mark.parametrize("wish", ["adopt", "anew", "after_crash"])
def test_start(agent: StandIn, run: Run, asked: list[Any], wish: str) -> None:
    assert "/run/sealane/vtpm/web01.sock" in run("vtpm", "start", "web01").stdout
    assert run("vtpm", "start", "web01", f"--{wish.replace('_', '-')}").exit_code == 0
    assert asked == [("web01", set()), ("web01", {wish})]


@pytest.mark.parametrize("what", ["stop", "rotate", "verify"])
def test_changes(agent: StandIn, run: Run, asked: list[Any], what: str) -> None:
    assert "web01" in run("vtpm", what, "web01").stdout
    assert asked == [("web01", what)]


def test_status(agent: StandIn, run: Run, asked: list[Any]) -> None:
    shown = run("vtpm", "status", "web01").stdout
    for word in ("here, waits for QEMU", "/var/lib/vtpm", "a key file", "0.7.1", "SHA-256 eeee"):
        assert word in shown
    assert json.loads(run("vtpm", "status", "web01", "--json").stdout) == VIEW.model_dump(mode="json")


def test_a_refusal_says_how_to_go_on(agent: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> VtpmView:
        raise make_error("vtpm.ahead", "the files of web01's TPM are not those that were noted")

    monkeypatch.setattr(AgentClient, "start_vtpm", refuse)
    refused = run("vtpm", "start", "web01")
    assert refused.exit_code != 0
    assert "vtpm.ahead" in refused.stderr
    assert "--after-crash" in refused.stderr


def test_help_shows_how_it_begins(run: Run) -> None:
    assert "sealane vtpm start web01" in run("vtpm", "--help").stdout
    assert "-chardev socket,id=chrtpm" in run("vtpm", "start", "--help").stdout


def swtpm_findings(run: Run) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in run("doctor", "--json").stdout.splitlines()]
    return {one["check"]: one for one in lines if one["check"] in {"swtpm", "vTPM keys"}}


def tools(directory: Path, *names: str, version: str) -> str:
    for name in names:
        (directory / name).write_text(f"#!/bin/sh\necho 'TPM emulator version {version}, Copyright'\n")
        (directory / name).chmod(0o755)
    return str(directory)


def test_the_doctor_wants_swtpm_where_a_vm_needs_it(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert swtpm_findings(run)["swtpm"]["level"] == "ok"
    Records(Paths.from_environment().state / "vtpm").save(RECORD)
    found = swtpm_findings(run)["swtpm"]
    assert (found["level"], found["mend"]) == ("broken", "for such VMs install swtpm, swtpm-tools")
    assert "web01" in found["found"]

    monkeypatch.setenv("PATH", tools(tmp_path, "swtpm", version="0.7.1"))
    found = swtpm_findings(run)["swtpm"]  # the last line of that check
    assert (found["level"], found["mend"]) == ("broken", "install swtpm-tools")

    tools(tmp_path, "swtpm_setup", version="0.7.1")
    found = swtpm_findings(run)["swtpm"]
    assert found["level"] == "ok"
    assert "0.7.1; no hand-over of its lock" in found["found"]
    assert "whoever copies" in swtpm_findings(run)["vTPM keys"]["found"]

    tools(tmp_path, "swtpm", version="0.6.3")
    assert "0.7.0 is the oldest" in swtpm_findings(run)["swtpm"]["found"]
