"""The other commands against a stand-in agent: what they show, give as JSON, and exit with."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import sealane
from sealane.cli import checks, completion
from sealane.cli.application import gather_launch_command
from sealane.cli.findings import Context, Finding
from sealane.cli.output import failure_text
from sealane.cli.trust_checks import check_expectations, check_roots
from sealane.crypto.identity import create_identity, load_identity, save_identity
from sealane.enclave.sandbox import MEASURES, REQUIRED
from sealane.errors import CATALOGUE, make_error
from sealane.host.models import Progress, Vm
from sealane.paths import Paths
from tests.cli.conftest import Run
from tests.cli.stand_in import CHANNEL, FINGERPRINT, HALFWAY, StandIn, completed, failed, migration


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_init_makes_then_shows(run: Run) -> None:
    made = run("init", "--name", "host-a")
    assert made.exit_code == 0
    assert made.stdout.startswith("identity   host-a  SHA256:")
    assert "(Ed25519)      root of trust  software key (identity only)" in made.stdout
    assert run("init").stdout == made.stdout
    assert run("init", "--name", "host-a").stdout == made.stdout


def configure(**attestation: object) -> None:
    config = Paths.from_environment().config
    config.mkdir(exist_ok=True)
    lines = [f"{name} = {json.dumps(value)}" for name, value in attestation.items()]
    (config / "agent.toml").write_text("\n".join(["[attestation]", *lines, ""]))


def fake_tpm(directory: Path, monkeypatch: pytest.MonkeyPatch, vendor: str) -> None:
    """A tpm2_getcap that knows one maker."""
    tool = directory / "tpm2_getcap"
    tool.write_text(f"#!/bin/sh\nprintf 'TPM2_PT_VENDOR_STRING_1:\\n  raw: 0x0\\n  value: \"{vendor}\"\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_init_and_doctor_say_which_root_of_trust_is_in_use(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def said() -> tuple[str, Finding]:
        shown: str = objects(run("init", "--json").stdout)[0]["root_of_trust"]
        assert f"root of trust  {shown}" in run("init").stdout
        (found,) = check_roots(Context(Paths.from_environment()))
        return shown, found

    run("init", "--name", "host-a")
    words, found = said()
    assert words == "software key (identity only)"
    assert (found.level, found.found) == ("ok", f"{words}: nothing proves what runs here")

    configure(drivers=["tpm2"], tcti="device:/dev/tpmrm7")
    fake_tpm(tmp_path, monkeypatch, "SW   TPM")
    words, found = said()
    assert words == "software TPM (swtpm or alike) at device:/dev/tpmrm7, SIMULATED: for tests only"
    assert (found.level, found.found) == ("warning", words)
    assert "by name only" in found.mend
    fake_tpm(tmp_path, monkeypatch, "SLB9")
    words, found = said()
    assert (words, found.level) == ("TPM 2.0 at device:/dev/tpmrm7", "ok")
    (tmp_path / "tpm2_getcap").write_text("#!/bin/sh\necho no such device >&2\nexit 1\n")
    words, found = said()
    assert "does not answer" in words
    assert (found.level, "no such device" in found.found) == ("broken", True)

    configure(drivers=["simulated"], simulated_root=str(tmp_path))
    assert said()[1].level == "broken"
    (tmp_path / "key.pem").write_text("")
    words, found = said()
    assert words == "simulated TEE (test root, isolates nothing), SIMULATED: for tests only"
    assert found.level == "warning"

    monkeypatch.setenv("SEALANE_SYSTEM_ROOT", str(tmp_path))
    for driver, path in (("sgx", "dev/attestation/attestation_type"), ("tdx", "sys/kernel/config/tsm/report")):
        configure(drivers=[driver])
        assert said()[1].level == "broken"
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
        words, found = said()
        assert found == Finding("root of trust", "ok", words)

    (Paths.from_environment().config / "agent.toml").write_text("bogus = 1\n")
    assert "unknown key bogus" in objects(run("init", "--json").stdout)[0]["root_of_trust"]


def test_doctor_looks_at_roots_of_trust_and_files_of_expectations(run: Run, tmp_path: Path) -> None:
    def look() -> Finding:
        (found,) = check_expectations(Context(Paths.from_environment()))
        return found

    path = tmp_path / "values.toml"
    configure(reference_values=str(path))
    missing = look()
    assert (missing.check, missing.level, missing.found) == ("reference values", "broken", f"{path} is not there")
    path.write_text("version = 1\n")
    assert look().level == "ok"
    path.write_text("version = 1\n[tpm]\nkeys = 5\n")
    broken = look()
    assert (broken.level, broken.mend) == ("broken", "mend the line that is named")
    assert f"{path}: line 3: tpm.keys" in broken.found
    told = findings(run)
    assert told["reference values"]["found"] == broken.found
    assert told["root of trust"]["found"].startswith("software key (identity only)")
    assert told["memfd_secret"]["level"] == "warning"
    assert told["memfd_secret"]["found"].startswith("not used (which this kernel has")


def test_an_agent_does_not_start_on_a_broken_file_of_expectations(run: Run, tmp_path: Path) -> None:
    run("init", "--name", "host-a")
    path = tmp_path / "values.toml"
    path.write_text("version = 1\nhosts = 1\n")
    configure(reference_values=str(path))
    result = run("agent")
    assert result.exit_code == 2
    assert "attest.reference" in result.stderr
    assert f"{path}: line 2: hosts" in result.stderr
    assert "Mend: mend the line that is named" in result.stderr


def test_init_keeps_the_identity_of_another_name(run: Run) -> None:
    run("init", "--name", "host-a")
    result = run("init", "--name", "host-b")
    assert result.exit_code == 6
    assert result.stderr.splitlines()[0].endswith("identity.exists")


def test_init_renew_changes_the_fingerprint_and_keeps_the_name(run: Run) -> None:
    before = objects(run("init", "--name", "host-a", "--json").stdout)[0]
    after = objects(run("init", "--renew", "--json").stdout)[0]
    assert after["name"] == "host-a"
    assert after["fingerprint"] != before["fingerprint"]
    assert (before["created"], after["created"]) == (True, True)
    assert load_identity(Paths.from_environment()).fingerprint == after["fingerprint"]


def test_init_refuses_an_odd_name(run: Run) -> None:
    assert run("init", "--name", "a b").exit_code == 2


def test_trust(agent: StandIn, run: Run) -> None:
    spelled = ":".join(["AB"] * 32)
    result = run("trust", "add", "host-c", spelled, "--address", "[2001:db8::3]:99")
    assert result.exit_code == 0, result.output
    peer = agent.peers["host-c"]
    assert (peer.fingerprint, peer.address, peer.port) == ("SHA256:" + "ab" * 32, "2001:db8::3", 99)
    listed = run("trust", "list").stdout
    assert "[2001:db8::3]:99" in listed
    assert FINGERPRINT in listed
    assert run("trust", "remove", "host-c").exit_code == 0
    missing = run("trust", "remove", "host-c")
    assert missing.exit_code == 6
    assert missing.stderr.splitlines()[0].endswith("trust.unknown")


def test_trust_without_address_and_bad_fingerprints(agent: StandIn, run: Run) -> None:
    assert "none can be sent to it" in run("trust", "add", "host-d", FINGERPRINT).stdout
    assert run("trust", "add", "host-d", "SHA256:7d1f…c2").exit_code == 2
    assert run("trust", "add", "bad name", FINGERPRINT).exit_code == 2
    assert run("trust", "add", "host-b", "ab" * 32).exit_code == 6


def test_vm(agent: StandIn, run: Run) -> None:
    result = run("vm", "add", "db02", "--qmp", "/run/db02.qmp", "--launch-incoming", "qemu -m '4 G' -v")
    assert result.exit_code == 0, result.output
    assert agent.vms["db02"].launch_incoming == ["qemu", "-m", "4 G", "-v"]
    listed = run("vm", "list").stdout.splitlines()
    assert listed[0].split()[:4] == ["VM", "DRIVER", "STATE", "MEMORY"]
    assert "4 GiB" in listed[1]
    assert "qemu -m '4 G' -v" in run("vm", "show", "db02").stdout
    assert [one["name"] for one in objects(run("vm", "list", "--json").stdout)] == ["web01", "db02"]
    assert run("vm", "remove", "db02").exit_code == 0
    missing = run("vm", "show", "db02")
    assert missing.exit_code == 6
    assert missing.stderr.splitlines()[0].endswith("vm.unknown")


def test_vm_list_tells_what_waits_from_what_moves(agent: StandIn, run: Run) -> None:
    held = {"migration": "a" * 32, "migration_state": "queued"}
    agent.vms = {
        "db02": Vm(name="db02", qmp="/q", state="running", vtpm="/tpm/db02", **held),  # type: ignore[arg-type]
        "web01": Vm(name="web01", qmp="/w", state="running", migration="b" * 32, migration_state="copying"),
        "win": Vm(name="win", qmp="libvirt:x", state="running", driver="libvirt", source="libvirt"),
    }
    heads, *rows = run("vm", "list").stdout.splitlines()
    assert "running, queued" in rows[0]
    assert "running, migrating" in rows[1]
    assert [row[heads.index("vTPM") :].split()[0] for row in rows] == ["yes", "no", "no"]
    assert "known from  libvirt" in run("vm", "show", "win").stdout
    assert "a" * 8 in run("vm", "show", "db02").stdout


def test_nobody_says_that_a_vm_runs_which_did_not_answer(agent: StandIn, run: Run) -> None:
    agent.latest = failed("vm.unreachable", progress=Progress()).migration
    agent.remembered = [agent.latest]
    for told in (run("status", "web01").stdout, run("cancel", "web01").stderr):
        assert "web01 does not answer here" in told
        assert "still runs" not in told


def test_rate(agent: StandIn, run: Run) -> None:
    assert "unlimited" in run("rate").stdout
    assert run("rate", "5Gb/s").stdout == "✓ all moves together  5 Gb/s\n"
    assert objects(run("rate", "--json").stdout) == [{"max_bytes_per_s": 625_000_000}]
    assert run("rate", "unlimited").exit_code == 0
    assert agent.rate.max_bytes_per_s == 0
    assert run("rate", "fast").exit_code == 2


@pytest.mark.parametrize("how", [["--launch-incoming"], ["--launch-incoming", "--"], ["--"]])
def test_launch_command_keeps_its_own_options(agent: StandIn, run: Run, how: list[str]) -> None:
    command = ["qemu", "-m", "4G", "-v", "--json", "-incoming", "defer"]
    result = run("vm", "add", "db02", "--qmp", "/run/db02.qmp", *how, *command)
    assert result.exit_code == 0, result.output
    assert agent.vms["db02"].launch_incoming == command
    assert result.stdout.startswith("✓")


def test_launch_command_given_twice_or_broken(agent: StandIn, run: Run) -> None:
    given = ("vm", "add", "db02", "--qmp", "/q", "--launch-incoming")
    assert run(*given, "a b", "--", "c").exit_code == 2
    assert run(*given, "a 'b").exit_code == 2
    assert gather_launch_command(["vm", "add", "x", "--launch-incoming", "a b", "--json"])[-1] == "--json"
    assert gather_launch_command(["migrate", "--launch-incoming", "a", "b"])[-3] == "--launch-incoming"


def test_empty_lists_say_what_to_do(agent: StandIn, run: Run) -> None:
    agent.vms.clear()
    agent.peers.clear()
    assert "sealane vm add" in run("vm", "list").stdout
    assert "sealane trust add" in run("trust", "list").stdout
    assert run("vm", "list", "--json").output == ""
    assert "no migration" in run("status").stdout


def remember(agent: StandIn) -> None:
    first = failed("lane.integrity").migration.model_copy(update={"id": "a" * 32, "number": 211})
    second = completed().migration.model_copy(update={"id": "b" * 32, "number": 212})
    going = migration("copying", progress=HALFWAY, **CHANNEL)
    agent.remembered = [first, second, going]
    agent.latest = going


def test_status_shows_active_first_and_why_each_ended(agent: StandIn, run: Run) -> None:
    remember(agent)
    lines = run("status").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["NO", "213", "212", "211"]
    assert "copying 71 %" in lines[1]
    assert "on host-b" in lines[2]
    assert "completed in 4.8 s, 31 ms down" in lines[2]
    assert "here" in lines[3]
    assert "(lane.integrity)" in lines[3]


def test_status_of_one(agent: StandIn, run: Run) -> None:
    remember(agent)
    shown = run("status", "web01").stdout
    assert shown.startswith("web01 to host-b, migration 213\n  runs      web01 still runs here")
    assert "before it" in shown
    ended = run("status", "211").stdout
    assert "aborted at 71 %; web01 still runs here" in ended
    assert CATALOGUE["lane.integrity"].mend in ended
    assert "web01 runs on host-b" in run("status", "b" * 32).stdout
    assert [one["number"] for one in objects(run("status", "--json").stdout)] == [213, 212, 211]


def test_status_of_the_unknown(agent: StandIn, run: Run) -> None:
    for which, code in (("99", "migration.unknown"), ("nobody", "vm.unknown"), ("c" * 32, "migration.unknown")):
        result = run("status", which)
        assert result.exit_code == 6
        assert result.stderr.splitlines()[0].endswith(code)
    assert run("status", "web01").exit_code == 0


def test_status_at_the_destination(agent: StandIn, run: Run) -> None:
    end = completed().migration.model_copy(update={"role": "destination", "peer": "host-a"})
    agent.remembered = [end]
    agent.latest = end
    assert "web01 runs here" in run("status", "web01").stdout
    assert "← host-a" in run("status").stdout


def test_status_of_a_vm_whose_half_was_given_up(agent: StandIn, run: Run) -> None:
    agent.remembered = [failed("handover.half-lost", state="completed", runs_at="nowhere").migration]
    agent.latest = agent.remembered[0]
    row = run("status").stdout.splitlines()[1]
    assert "nowhere" in row
    assert "(handover.half-lost)" in row
    shown = run("status", "web01").stdout
    assert "web01 runs nowhere" in shown
    assert CATALOGUE["handover.half-lost"].mend in shown


def test_cancel(agent: StandIn, run: Run) -> None:
    remember(agent)
    result = run("cancel", "web01")
    assert result.exit_code == 0
    assert "is being cancelled" in result.stdout
    assert agent.cancels == 1
    over = run("cancel", "212")
    assert over.exit_code == 6
    assert "web01 runs on host-b" in over.stderr
    agent.cancel_refusal = make_error("migration.too-late")
    assert run("cancel", "213").stderr.splitlines()[0].endswith("migration.too-late")


def test_version(run: Run) -> None:
    told = objects(run("version", "--json").stdout)[0]
    assert told["version"] == sealane.__version__
    assert set(told) == {"version", "python", "openssl", "protocol"}
    assert sealane.__version__ in run("version").stdout


def test_version_loads_neither_client_nor_models() -> None:
    code = (
        "import sys; sys.argv = ['sealane', 'version']\n"
        "from sealane.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'httpx', 'sealane.host.models', 'fastapi', 'uvicorn', 'numpy', 'rich.live'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sealane.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sealane.__version__ in done.stdout


def test_misuse_is_told_like_every_failure(run: Run) -> None:
    for arguments in (["bogus"], ["migrate"], ["migrate", "a", "b", "--multifd", "x"], ["status", "--bogus"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.splitlines()[0].startswith("✗ ")
        assert result.stderr.splitlines()[0].endswith(" usage.argument")
        assert "--help" in result.stderr
        assert objects(run("--json", *arguments).stdout)[0]["code"] == "usage.argument"


def test_without_a_command_help_is_shown(run: Run) -> None:
    result = run()
    assert result.exit_code == 2
    assert "sealane migrate web01 host-b" in result.stderr


def test_failure_text_puts_the_code_at_the_right_edge() -> None:
    text = failure_text(make_error("vm.unknown", "no VM x"), width=80)
    first = text.splitlines()[0]
    assert len(first) == 80
    assert first.startswith("✗ no VM x  ")
    assert failure_text(make_error("vm.unknown", "y" * 90), width=80).splitlines()[0].endswith("y  vm.unknown")


def test_error_detail_is_one_line(agent: StandIn, run: Run) -> None:
    agent.refusal = make_error("vm.qmp", "first\nsecond \x1b[31m \u202e")
    lines = run("migrate", "web01", "host-b").stderr.splitlines()
    assert len(lines) == 3
    assert "\x1b" not in "".join(lines)


def test_latin_terminal_gets_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(sealane.__file__).parents[1]), "PYTHONIOENCODING": "latin-1"}
    told = subprocess.run(
        [sys.executable, "-m", "sealane.cli", "status"], env=environment, capture_output=True, check=False
    )
    assert told.returncode == 6
    assert b"Traceback" not in told.stderr
    assert told.stderr.startswith(b"? ")


def test_closed_pipe_is_no_traceback() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(sealane.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "sealane.cli", "doctor"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() != 0


def test_names_for_completion(agent: StandIn) -> None:
    remember(agent)
    assert completion.vm_names("we") == ["web01"]
    assert completion.vm_names("x") == []
    assert completion.host_names("") == ["host-b"]
    assert completion.moving_names("") == ["web01"]


def test_completion_through_the_shell(agent: StandIn) -> None:
    words = {"_SEALANE_COMPLETE": "complete_bash", "COMP_WORDS": "sealane migrate we", "COMP_CWORD": "2"}
    environment = {**os.environ, "PYTHONPATH": str(Path(sealane.__file__).parents[1]), **words}
    told = subprocess.run(
        [sys.executable, "-m", "sealane.cli"], env=environment, capture_output=True, text=True, check=False
    )
    assert told.stdout.split() == ["web01"]


def test_completion_without_an_agent_is_silent() -> None:
    began = time.monotonic()
    assert completion.vm_names("") == []
    assert time.monotonic() - began < 5


def findings(run: Run) -> dict[str, dict[str, Any]]:
    return {one["check"]: one for one in objects(run("doctor", "--json").stdout)}


def test_doctor_finds_what_is_broken(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 5
    assert "✗ identity" in result.stdout
    assert "Mend: run `sealane init`" in result.stdout
    assert "broken" in result.stdout.splitlines()[-1]


def test_doctor_json_and_quiet(run: Run) -> None:
    found = findings(run)
    assert {"TLS", "AES-256-GCM", "identity", "port", "clock", "Landlock", "memfd_secret"} <= set(found)
    assert {f"sandbox {name}" for name in MEASURES} <= set(found)
    assert all(found[f"sandbox {name}"]["level"] == "ok" for name in REQUIRED)
    assert all(set(one) == {"check", "level", "found", "mend"} for one in found.values())
    assert all(one["mend"] for one in found.values() if one["level"] != "ok")
    quiet = run("doctor", "-q")
    assert quiet.stdout == ""
    assert "✗ identity" in quiet.stderr


def test_doctor_is_content_with_a_host_in_order(
    agent: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("init", "--name", "host-a")
    monkeypatch.setattr(checks, "check_qemu", lambda _: [Finding("QEMU", "ok", "10.0.0")])
    monkeypatch.setitem(checks.CHECKS, "QEMU", lambda _: [Finding("QEMU", "ok", "10.0.0")])
    monkeypatch.setattr("sealane.cli.probes.port_holder", lambda host, port: "in use")
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "is held by our agent" in result.stdout
    assert "X25519MLKEM768" in result.stdout


def test_doctor_names_a_foreign_holder_of_the_port(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sealane.cli.probes.port_holder", lambda host, port: "in use")
    assert findings(run)["port"]["level"] == "broken"


def fake_qemu(path: Path, version: str, capabilities: list[str]) -> str:
    listed = json.dumps({"return": [{"capability": name, "state": False} for name in capabilities]})
    path.write_text(
        f"#!/bin/sh\n[ \"$1\" = --version ] && echo 'QEMU emulator version {version}' && exit\necho '{listed}'\n"
    )
    path.chmod(0o755)
    return str(path)


def test_doctor_warns_of_an_old_qemu(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("SEALANE_QEMU", fake_qemu(tmp_path / "q", "7.2.11 (Debian)", ["xbzrle"]))
    monkeypatch.setattr("sealane.cli.probes.os.path.realpath", lambda path: path)
    found = findings(run)
    assert found["QEMU"]["level"] == "warning"
    assert "dirty pages" in found["QEMU"]["found"]
    assert found["multifd"]["level"] == "warning"


def test_doctor_likes_a_new_qemu_and_refuses_none(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert findings(run)["QEMU"]["level"] == "broken"
    monkeypatch.setenv("SEALANE_QEMU", "/nonexistent/qemu")
    assert findings(run)["QEMU"]["level"] == "broken"
    monkeypatch.setenv("SEALANE_QEMU", fake_qemu(tmp_path / "q", "10.0.2", ["multifd"]))
    found = findings(run)
    assert (found["QEMU"]["level"], found["multifd"]["level"]) == ("ok", "ok")


def test_doctor_looks_at_the_identity(run: Run) -> None:
    paths = Paths.from_environment()
    now = datetime.now(UTC)
    save_identity(paths, create_identity("host-a", now=now, lifetime_days=5))
    assert findings(run)["identity"]["level"] == "warning"
    paths.identity_key.chmod(0o644)
    assert "others can read" in findings(run)["identity"]["found"]
    save_identity(paths, create_identity("host-a", now=now - timedelta(days=9), lifetime_days=5), replace=True)
    assert "expired" in findings(run)["identity"]["found"]


def test_doctor_looks_at_directories_and_configuration(run: Run) -> None:
    paths = Paths.from_environment()
    paths.config.mkdir()
    paths.config.chmod(0o777)
    (paths.config / "agent.toml").write_text("bogus = 1\n")
    found = findings(run)
    assert found["configuration directory"]["level"] == "broken"
    assert found["configuration"]["level"] == "broken"
    assert "line 1" in found["configuration"]["found"]
