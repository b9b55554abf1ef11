"""Files for disks that are copied: made where this host allows it, over nothing that is there, and removed if they are ours."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sealane.errors import SealaneError
from sealane.host.migration.messages import DiskWish
from sealane.host.migration.volumes import make_volumes, remove_volumes
from sealane.host.models import MadeVolume


def wish(path: Path | str, **changes: Any) -> DiskWish:
    given = {"target": "vda", "path": str(path), "format": "raw", "capacity_bytes": 1 << 20, "allocation_bytes": 4096}
    return DiskWish.model_validate({**given, **changes})


class Notes:
    """What was journalled last, and whether the named files were there already."""

    def __init__(self) -> None:
        self.last: list[MadeVolume] = []
        self.was_there: list[bool] = []

    def __call__(self, made: list[MadeVolume]) -> None:
        self.last = made
        self.was_there.append(Path(made[-1].path).exists())


async def test_a_file_is_made_after_it_was_journalled_and_removed_again(tmp_path: Path) -> None:
    notes = Notes()
    wishes = [wish(tmp_path / "a.raw"), wish(tmp_path / "b.raw", target="vdb", capacity_bytes=512)]
    await make_volumes(wishes, [str(tmp_path)], notes)
    assert [each.stat().st_size for each in (tmp_path / "a.raw", tmp_path / "b.raw")] == [1 << 20, 512]
    assert (tmp_path / "a.raw").stat().st_mode & 0o777 == 0o600
    assert notes.was_there == [False, False]
    remove_volumes(notes.last)
    remove_volumes(notes.last)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img makes qcow2")
async def test_a_layer_is_made_above_its_backing_file(tmp_path: Path) -> None:
    base, notes = tmp_path / "base.raw", Notes()
    above = wish(tmp_path / "a.qcow2", format="qcow2", backing=str(base), backing_format="raw")
    with pytest.raises(SealaneError, match="the backing file of vda"):
        await make_volumes([above], [str(tmp_path)], notes)
    base.write_bytes(bytes(512))
    await make_volumes([above], [str(tmp_path)], notes)
    content = (tmp_path / "a.qcow2").read_bytes()
    assert content[:4] == b"QFI\xfb"
    assert str(base).encode() in content
    assert int.from_bytes(content[24:32], "big") == 1 << 20


async def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"mine")
    (tmp_path / "b.raw").symlink_to(tmp_path / "nowhere")
    for name in ("a.raw", "b.raw"):
        with pytest.raises(SealaneError, match="is there already") as raised:
            await make_volumes([wish(tmp_path / name)], [str(tmp_path)], Notes())
        assert raised.value.code == "check.volume"
    assert (tmp_path / "a.raw").read_bytes() == b"mine"


async def test_a_file_that_comes_at_the_last_moment_is_left_alone(tmp_path: Path) -> None:
    path, made = tmp_path / "a.raw", list[MadeVolume]()

    def note(volumes: list[MadeVolume]) -> None:
        made.extend(volumes)
        path.write_bytes(b"mine")

    with pytest.raises(SealaneError, match="is there already"):
        await make_volumes([wish(path)], [str(tmp_path)], note)
    remove_volumes(made)
    assert path.read_bytes() == b"mine"


async def test_files_are_made_in_the_directories_that_are_allowed(tmp_path: Path) -> None:
    allowed, other = tmp_path / "allowed", tmp_path / "other"
    allowed.mkdir()
    other.mkdir()
    (allowed / "way-out").symlink_to(other)
    paths: list[Path | str] = [
        other / "a.raw",
        allowed / "way-out/a.raw",
        f"{allowed}/../other/a.raw",
        tmp_path / "allowed-too/a.raw",
        allowed / "missing/a.raw",
        "/a.raw",
    ]
    for path in paths:
        with pytest.raises(SealaneError) as raised:
            await make_volumes([wish(path)], [str(allowed)], Notes())
        assert raised.value.code == "check.volume"
    with pytest.raises(SealaneError, match="storage_directories"):
        await make_volumes([wish(allowed / "a.raw")], [], Notes())
    backing = wish(allowed / "a.qcow2", format="qcow2", backing="/etc/passwd", backing_format="raw")
    with pytest.raises(SealaneError, match="/etc/passwd is in none"):
        await make_volumes([backing], [str(allowed)], Notes())
    assert not list(other.iterdir())


async def test_what_does_not_fit_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    free = os.statvfs(tmp_path)
    half = free.f_bavail * free.f_frsize * 2 // 3
    wishes = [wish(tmp_path / f"{n}.raw", capacity_bytes=1 << 60, allocation_bytes=half) for n in range(2)]
    with pytest.raises(SealaneError, match="too little room"):
        await make_volumes(wishes, [str(tmp_path)], Notes())
    assert not list(tmp_path.iterdir())


async def test_another_file_in_its_place_is_not_removed(tmp_path: Path) -> None:
    notes = Notes()
    await make_volumes([wish(tmp_path / "a.raw")], [str(tmp_path)], notes)
    kept = tmp_path / "kept"
    (tmp_path / "a.raw").rename(kept)  # so that its inode is not given to the other
    (tmp_path / "a.raw").write_bytes(b"mine")
    remove_volumes(notes.last)
    assert (tmp_path / "a.raw").read_bytes() == b"mine"
