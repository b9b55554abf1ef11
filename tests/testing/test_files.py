"""The guest with real files: what is chosen is what was asked for, the same each time, and the archive is whole."""

import pytest

from sealane.testing.guest.build import guest_initrd, padded
from sealane.testing.guest.files import Files, chosen_files, initrd_with_files
from sealane.testing.problems import RigError


def test_programs_then_text_and_the_same_each_time() -> None:
    chosen = chosen_files(Files(programs_mib=2, text_mib=1))
    kinds = [path.read_bytes()[:4] == b"\x7fELF" for path in chosen]
    assert kinds == sorted(kinds, reverse=True)
    programs = sum(path.stat().st_size for path, is_program in zip(chosen, kinds, strict=True) if is_program)
    assert 2 << 20 <= programs < 10 << 20
    assert not any(b"\0" in path.read_bytes()[:4096] for path in chosen[sum(kinds) :])
    assert initrd_with_files(Files(2, 1)) == initrd_with_files(Files(2, 1))


def test_the_archive_follows_the_guests_own() -> None:
    files = Files(programs_mib=1, text_mib=1)
    own = padded(guest_initrd().read_bytes())
    archive = initrd_with_files(files).read_bytes()
    assert archive.startswith(own)
    assert archive[len(own) :].startswith(b"070701")
    assert all(path.read_bytes() in archive for path in chosen_files(files))


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(RigError, match="has not"):
        chosen_files(Files(programs_mib=1 << 20, text_mib=0))
