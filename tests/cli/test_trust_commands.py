"""Policy, hosts, pairing and receipts on the command line, against a real agent without a port, or no agent at all."""

import asyncio
import json
import os
import pwd
import shutil
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from sealane.cli.output import Output
from sealane.cli.output import Settings as OutputSettings
from sealane.cli.pair import compare_words
from sealane.crypto.identity import create_identity, save_identity
from sealane.errors import SealaneError
from sealane.host.agent import Agent
from sealane.host.api import create_app
from sealane.host.callers import CallerProtocol
from sealane.host.config import Settings
from sealane.host.models import Peer, PeerTrust, VmDefinition
from sealane.paths import Paths
from tests.cli.conftest import Run
from tests.host.receipts.rig import ReceiptHost, make_host
from tests.host.stand_ins import StandInListener, make_source

FINGERPRINT = "SHA256:" + "7d1f" * 16
ME = pwd.getpwuid(os.getuid()).pw_name


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def live(own_directories: None) -> Iterator[Paths]:
    """An agent's whole interface on its socket: web01 asks for level 2, host-b reached 3 by a test root, host-c was not met."""
    paths = Paths.from_environment()
    for directory in (paths.state, paths.run, paths.config):
        directory.mkdir()
    save_identity(paths, create_identity("host-a", now=datetime.now(UTC)))
    holder: dict[str, Any] = {}
    ready = threading.Event()

    async def serve() -> None:
        agent = Agent(paths, Settings(name="host-a"), make_listener=StandInListener, make_source=make_source)
        agent.registry.add(VmDefinition(name="web01", qmp="/run/web01.qmp", least_level=2, labels={"tier": "web"}))
        agent.peers.add(Peer(name="host-b", fingerprint=FINGERPRINT, address="192.0.2.7", port=48217))
        agent.peers.add(Peer(name="host-c", fingerprint="SHA256:" + "0c" * 32))
        simulated = PeerTrust(level=3, production_level=1, root="TPM (test root)", seen_at=datetime.now(UTC))
        agent.store.note_sighting(FINGERPRINT, simulated)
        config = uvicorn.Config(
            create_app(agent), uds=str(paths.agent_socket), log_level="critical", lifespan="off", http=CallerProtocol
        )
        holder["server"] = server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready.set()
        await serving
        agent.store.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(20)
    yield paths
    holder["server"].should_exit = True
    thread.join(10)


def write_policy(paths: Paths, text: str) -> None:
    (paths.config / "policy").mkdir(exist_ok=True)
    (paths.config / "policy" / "own.cedar").write_text(text)


def test_check_says_why(live: Paths, run: Run) -> None:
    denied = run("policy", "check", "web01", "host-b")
    assert denied.exit_code == 1
    assert denied.stdout.startswith(
        "✗ web01 may not move to host-b: no policy allows it; it would be allowed to a host of level 2"
    )
    write_policy(
        live, '@id("the test root counts here") permit (principal, action, resource) when { context.peer.level >= 3 };'
    )
    allowed = run("policy", "check", "web01", "host-b", "--json")
    assert allowed.exit_code == 0
    (answer,) = objects(allowed.stdout)
    assert answer["decision"]["words"] == 'allowed by "the test root counts here"'
    assert answer["user"] == ME
    below = run("policy", "check", "web01", "host-b", "--level", "1")
    assert (below.exit_code, "policy.level-too-low" in below.stdout) == (1, True)


def test_check_for_another_user_and_the_other_way(live: Paths, run: Run) -> None:
    write_policy(live, f'permit (principal == User::"{ME}", action == Action::"send", resource);')
    assert run("policy", "check", "web01", "host-b").exit_code == 0
    assert run("policy", "check", "web01", "host-b", "--user", "nobody").exit_code == 1
    assert run("policy", "check", "web01", "host-b", "--receive").exit_code == 1
    assert run("policy", "check", "nowhere", "host-b").exit_code == 6
    assert run("policy", "check", "web01", "nobody").exit_code == 6


def test_a_broken_policy_is_told_everywhere(live: Paths, run: Run) -> None:
    write_policy(live, "permit (principal")
    for command in (["policy", "check", "web01", "host-b"], ["policy", "show"], ["hosts", "--for", "web01"]):
        result = run(*command)
        assert result.exit_code == 5
        assert result.stderr.splitlines()[0].endswith("policy.broken")
        assert "own.cedar" in result.stderr
    found = {one["check"]: one for one in objects(run("doctor", "--json").stdout)}
    assert found["policy"]["level"] == "broken"


def test_show_needs_no_agent_and_can_be_used_as_a_file(run: Run) -> None:
    shown = run("policy", "show", "--schema")
    assert shown.exit_code == 0
    assert (
        "default: any VM, between hosts that trust each other, sealed unless the settings allow otherwise"
        in shown.stdout
    )
    assert "entity Host in [HostGroup]" in shown.stdout
    (value,) = objects(run("policy", "show", "--json").stdout)
    assert (value["source"], [each["effect"] for each in value["policies"]]) == ("default", ["forbid", "permit"])


def test_hosts(live: Paths, run: Run) -> None:
    plain = run("hosts").stdout
    assert "3 (1 without test roots)" in plain
    assert "never" in plain
    rows = run("hosts", "--for", "web01").stdout.splitlines()
    assert rows[0].endswith("MAY web01 GO THERE")
    assert "no: no policy allows it" in rows[1]
    assert "no: host-c reached level 1 and web01 asks for 2" in rows[2]
    found = objects(run("hosts", "--for", "web01", "--json").stdout)
    assert [(one["name"], one["decision"]["code"]) for one in found] == [
        ("host-b", "policy.denied"),
        ("host-c", "policy.level-too-low"),
    ]


def test_pairing_asks_for_what_it_needs(live: Paths, run: Run) -> None:
    assert run("pair", "host-b").exit_code == 2
    slip = run("pair", "host-b", "7-orchyd-tempo")
    assert (slip.exit_code, "is it orchid?" in slip.stderr) == (2, True)
    unreachable = run("pair", "127.0.0.1:1", "7-orchid-tempo")
    assert (unreachable.exit_code, "peer.unreachable" in unreachable.stderr) == (3, True)


# Receipts, without an agent


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReceiptHost]:
    host = make_host(tmp_path / "r")
    for number in range(1, 4):
        host.end(number, vm=f"vm{number}")
    monkeypatch.setenv("SEALANE_STATE_DIR", str(host.paths.state))
    yield host
    host.store.close()


def test_receipts_list_and_show(kept: ReceiptHost, run: Run) -> None:
    listed = run("receipts", "list").stdout.splitlines()
    assert len(listed) == 4
    assert "vm3" in listed[3]
    shown = run("receipts", "show", "2")
    assert shown.exit_code == 0
    assert "VM           vm2, epoch 1" in shown.stdout
    assert "protection   sealed · readable on the wire: nothing" in shown.stdout
    (value,) = objects(run("receipts", "show", "2", "--json").stdout)
    assert value["statement"]["_type"] == "https://in-toto.io/Statement/v1"
    assert run("receipts", "show", "9").exit_code == 6


def test_receipts_verify(kept: ReceiptHost, run: Run, tmp_path: Path) -> None:
    whole = run("receipts", "verify")
    assert whole.exit_code == 0
    head = whole.stdout.splitlines()[-1].split()[-1]
    assert run("receipts", "verify", "--head", head, "2").exit_code == 0
    assert run("receipts", "verify", "--head", "3:" + "0" * 64).exit_code == 1
    assert run("receipts", "verify", "--head", "three").exit_code == 2
    assert run("receipts", "verify", "9").exit_code == 6
    copy = shutil.copy(kept.files()[2], tmp_path / "copy.dsse")
    kept.files()[2].unlink()
    broken = run("receipts", "verify", str(copy), "--json")
    assert broken.exit_code == 1
    (report,) = objects(broken.stdout)
    assert {problem["kind"] for problem in report["problems"]} == {"truncated"}
    assert "receipt 3" in run("doctor").stdout


def test_receipts_of_a_host_that_has_none(run: Run) -> None:
    assert run("receipts", "list").stdout == "no receipts yet\n"
    assert run("receipts", "verify").exit_code == 0


@pytest.mark.parametrize("same", [True, False])
def test_words_that_differ_are_said_at_the_terminal(same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[str] = []
    agent = SimpleNamespace(remove_peer=removed.append)
    monkeypatch.setattr("typer.confirm", lambda question: same)
    out = Output(OutputSettings())
    if same:
        compare_words(agent, "host-b", out, asks=True)  # type: ignore[arg-type]
    else:
        with pytest.raises(SealaneError, match=r"pairing\.mismatch"):
            compare_words(agent, "host-b", out, asks=True)  # type: ignore[arg-type]
    assert removed == ([] if same else ["host-b"])
