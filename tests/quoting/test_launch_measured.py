"""What runs is what was measured: no compiled module that somebody planted, and QEMU itself behind what launches it."""

import asyncio
import importlib.util
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sealane.enclave.interface import LAUNCHER_ENVIRONMENT
from sealane.errors import HostError
from sealane.host.config import AttestationSettings
from sealane.host.migration.enclave_launcher import EnclaveLauncher
from sealane.host.quoting import QuotingService, check_launched, incoming_binaries
from sealane.paths import ISOLATED, Paths


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
