"""What runs is what was measured: no compiled module that somebody planted, and QEMU itself behind what launches it."""

import asyncio
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
import venv
from datetime import UTC, datetime
from pathlib import Path

import pytest

from sealane.attest.asking import EvidenceAsked
from sealane.crypto.identity import create_identity, save_identity
from sealane.enclave.interface import LAUNCHER_ENVIRONMENT
from sealane.errors import HostError
from sealane.host.config import AttestationSettings
from sealane.host.fleet.evidence import ask_quoting
from sealane.host.migration.enclave_launcher import EnclaveLauncher
from sealane.host.quoting import QuotingService, check_launched, incoming_binaries
from sealane.paths import ISOLATED, Paths, isolated_module
from sealane.quoting.manifest import measure_enclave


def plant(directory: Path) -> None:
    """A module, and beside it a compiled one that says something else and is never compared with its source."""
    source, planted = directory / "honest.py", directory / "planted.py"
    source.write_text("WHO = 'source'\n")
    planted.write_text("WHO = 'planted'\n")
    cache = importlib.util.cache_from_source(str(source))
    py_compile.compile(str(planted), cache, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)


def who(directory: Path, *flags: str) -> str:
    code = f"import sys; sys.path.insert(0, {str(directory)!r}); import honest; print(honest.WHO)"
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], env=LAUNCHER_ENVIRONMENT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_planted_compiled_module_is_not_loaded(tmp_path: Path) -> None:
    plant(tmp_path)
    assert who(tmp_path, "-I") == "planted"  # so the plant is a good one
    assert who(tmp_path, *ISOLATED) == "source"


# ---- code that an interpreter runs at its start, and that is no module


@pytest.fixture
def planted(tmp_path: Path) -> tuple[str, Path]:
    """An interpreter with a library directory of its own, and what is written where somebody's code runs at its start."""
    directory = tmp_path / "venv"
    venv.create(directory, symlinks=True, with_pip=False)
    libraries = directory / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    ran = tmp_path / "ran"
    code = f"import sys; open({str(ran)!r}, 'a').write("
    # the first also sees to it that this sitecustomize is found before a distribution's own
    (libraries / "planted.pth").write_text(f"{code}'pth '); sys.path.insert(0, {str(libraries)!r})\n")
    (libraries / "sitecustomize.py").write_text(f"{code}'sitecustomize ')\n")
    python = str(directory / "bin/python")
    subprocess.run([python, "-I", "-c", ""], check=True)
    assert set(ran.read_text().split()) == {"pth", "sitecustomize"}  # so the plants are good ones
    ran.unlink()
    return python, ran


def test_nothing_runs_in_it_that_is_no_module(planted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    python, ran = planted
    monkeypatch.setattr(sys, "executable", python)
    subprocess.run(isolated_module("json.tool"), input=b"{}", env=LAUNCHER_ENVIRONMENT, capture_output=True, check=True)
    assert not ran.exists()
    # nor where it measures; and what is listed is what an honest interpreter lists
    names = {entry.name for entry in measure_enclave(not_after_ns=1 << 62).entries}
    assert {"runpy.py", "sealane/enclave/launcher.py", "sealane/paths.py"} <= names
    assert "sitecustomize.py" not in names
    assert not ran.exists()


async def test_neither_plant_runs_in_enclave_or_quoting_process(
    planted: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python, ran = planted
    monkeypatch.setattr(sys, "executable", python)
    paths = Paths(tmp_path / "state", tmp_path / "run", tmp_path / "config")
    save_identity(paths, create_identity("host", now=datetime.now(UTC)))
    launcher, quoting = EnclaveLauncher(sandbox="best-effort"), QuotingService(paths, AttestationSettings())
    quoting.start()
    try:
        enclave = await launcher.start_enclave()
        enclave.kill()
        await enclave.reap()
        with quoting.connect_agent() as line:
            evidence = await asyncio.to_thread(ask_quoting, line, EvidenceAsked(bytes(32), "vm"))
        assert "software.statement" in evidence
    finally:
        await asyncio.gather(launcher.stop(), quoting.stop())
    assert not ran.exists()


def test_nothing_is_compiled_for_others_to_find(tmp_path: Path) -> None:
    (tmp_path / "honest.py").write_text("WHO = 'source'\n")
    who(tmp_path, *ISOLATED)
    assert [path.name for path in tmp_path.iterdir()] == ["honest.py"]


async def test_the_processes_that_count_are_started_so(tmp_path: Path) -> None:
    launcher = EnclaveLauncher(sandbox="best-effort")
    quoting = QuotingService(Paths(tmp_path, tmp_path, tmp_path), AttestationSettings())
    launcher.start()
    quoting.start()
    try:
        for pid in (launcher.pid, quoting.pid):
            while not (said := Path(f"/proc/{pid}/cmdline").read_bytes()):
                await asyncio.sleep(0)  # between fork and exec
            words = said.decode().split("\0")
            assert tuple(words[1 : 1 + len(ISOLATED)]) == ISOLATED
    finally:
        await asyncio.gather(launcher.stop(), quoting.stop())


def test_qemu_behind_what_launches_it(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu-system-test"
    qemu.write_text("#!/bin/sh\n")
    qemu.chmod(0o755)
    taskset, shell = shutil.which("taskset"), shutil.which("sh")
    assert incoming_binaries([["taskset", "-c", "0", "--", str(qemu), "-M", "q35"]]) == [str(qemu)]
    assert incoming_binaries([[str(qemu)], None, ["sh", "launch.sh"]]) == sorted([str(qemu), str(shell)])
    assert incoming_binaries([["taskset", "1", "qemu-that-is-nowhere"]]) == [taskset]


def test_what_really_runs_counts(tmp_path: Path) -> None:
    copy = tmp_path / "qemu-system-copy"
    shutil.copy2(shutil.which("sleep") or "", copy)
    process = subprocess.Popen([str(copy), "60"])
    try:
        while os.readlink(f"/proc/{process.pid}/exe") != str(copy):
            pass  # between fork and exec
        check_launched(process.pid, ["/nowhere", str(copy)])
        for measured in ([], [shutil.which("sleep") or ""]):
            with pytest.raises(HostError, match=r"quoting\.qemu"):
                check_launched(process.pid, measured)
        copy.unlink()
        shutil.copy2(shutil.which("sleep") or "", copy)  # the same name and content, and another file
        with pytest.raises(HostError, match=r"quoting\.qemu"):
            check_launched(process.pid, [str(copy)])
        with pytest.raises(HostError, match=r"quoting\.qemu"):
            check_launched(0, [str(copy)])
    finally:
        process.kill()
        process.wait()
