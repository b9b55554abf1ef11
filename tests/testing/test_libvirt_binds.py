"""The QEMU that was asked for is the one that libvirtd finds, wherever it lies."""

import shlex
from pathlib import Path
from typing import Literal

import pytest

from sealane.testing import libvirt as module
from sealane.testing.libvirt import Libvirt, all_libvirts, emulator_binds, modules_to_hide
from sealane.testing.problems import RigError
from sealane.testing.qemu import QemuBinary

NAME = "qemu-system-x86_64"
PARTS = ("lib/x86_64-linux-gnu/qemu", "share/qemu", "share/seabios")


def installed(prefix: Path, *parts: str) -> Path:
    for each in parts:
        (prefix / each).mkdir(parents=True)
    (prefix / "bin").mkdir(parents=True, exist_ok=True)
    (prefix / "bin" / NAME).write_text(str(prefix))
    return prefix / "bin" / NAME


@pytest.fixture
def system(tmp_path: Path) -> Path:
    installed(tmp_path / "system/usr", *PARTS, "lib/ipxe/qemu")
    (tmp_path / "system/usr" / PARTS[0] / "accel.so").touch()
    return tmp_path / "system"


def test_a_usual_layout_comes_whole(tmp_path: Path, system: Path) -> None:
    for prefix in (tmp_path / "unpacked/usr", tmp_path / "opt"):
        emulator = installed(prefix, *PARTS)
        assert emulator_binds(emulator, system) == [
            (emulator, system / "usr/bin" / NAME),
            *((prefix / part, system / "usr" / part) for part in PARTS),
        ]
        assert modules_to_hide(emulator, system) == []


def test_of_a_layout_comes_what_it_has_and_the_system_has_too(tmp_path: Path, system: Path) -> None:
    emulator = installed(tmp_path / "opt", "share/qemu", "lib/riscv64-linux-gnu/qemu")
    inside = system / "usr"
    assert emulator_binds(emulator, system) == [
        (emulator, inside / "bin" / NAME),
        (tmp_path / "opt/share/qemu", inside / "share/qemu"),
    ]
    assert modules_to_hide(emulator, system) == [inside / PARTS[0]]


@pytest.mark.parametrize("path", ["/qemu", "/opt/qemu", "/bin/qemu-of-nobody"])
def test_a_path_with_few_parents(path: str, system: Path) -> None:
    assert emulator_binds(Path(path), system)[0] == (Path(path).resolve(), system / "usr/bin" / NAME)


def test_a_lone_binary(tmp_path: Path, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = tmp_path / "qemu/build" / NAME
    built.parent.mkdir(parents=True)
    built.touch()
    (tmp_path / "share/qemu").mkdir(parents=True)  # two above it, and none of its own
    whole = [(built, system / "usr/bin" / NAME)]
    assert emulator_binds(built, system) == whole
    (tmp_path / "link").symlink_to(built)
    assert emulator_binds(tmp_path / "link", system) == whole
    monkeypatch.chdir(built.parent)
    assert emulator_binds(Path(NAME), system) == whole
    assert modules_to_hide(Path(NAME), system) == [system / "usr" / PARTS[0]]


def test_the_systems_own_needs_nothing(tmp_path: Path, system: Path) -> None:
    assert emulator_binds(system / "usr/bin" / NAME, system) == []
    assert modules_to_hide(system / "usr/bin" / NAME, system) == []
    other = installed(tmp_path / "opt")
    (system / "usr/bin" / NAME).unlink()
    assert emulator_binds(other, system) == []  # libvirtd is told its path: nothing else is found first


def test_the_commands_name_odd_paths_as_they_are(tmp_path: Path, system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "emulator_binds", lambda path, below=system: emulator_binds(path, below))
    monkeypatch.setattr(module, "modules_to_hide", lambda path: modules_to_hide(path, system))
    odd = installed(tmp_path / "a b; 'c'")
    commands = Libvirt(Path("/"), QemuBinary(odd, (10, 0, 2), "environment")).mounts()
    assert [shlex.split(each) for each in commands] == [
        ["mount", "--bind", str(odd), str(system / "usr/bin" / NAME)],
        ["mount", "-t", "tmpfs", "none", str(system / "usr" / PARTS[0])],
    ]


@pytest.mark.parametrize("source", ["environment", "private"])
def test_no_libvirt_gets_another_qemu_than_was_asked_for(
    source: Literal["environment", "private"], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = QemuBinary(Path("/opt/qemu"), (10, 0, 2), source)
    system = QemuBinary(Path("/usr/bin") / NAME, (7, 2, 22), "system")
    monkeypatch.delenv("SEALANE_LIBVIRT", raising=False)
    monkeypatch.setattr(module, "find_qemu", lambda: asked)
    monkeypatch.setattr(module, "all_qemus", lambda: (asked,) if source == "environment" else (system, asked))
    monkeypatch.setattr(module, "private_libvirt", lambda: Path("/later"))
    later = Libvirt(Path("/later"), asked)
    here = [] if source == "environment" else [Libvirt(Path("/"), system)]
    assert list(all_libvirts.__wrapped__()) == [*here, later]

    def none_to_be_had() -> Path:
        raise RigError("no backports")

    monkeypatch.setattr(module, "private_libvirt", none_to_be_had)
    assert list(all_libvirts.__wrapped__()) == (here or [Libvirt(Path("/"), asked)])
