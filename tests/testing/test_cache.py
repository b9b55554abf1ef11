"""The cache: whole or not at all, and once."""

import threading
from pathlib import Path

import pytest

from sealane.testing.cache import CACHE_VARIABLE, build_once, cache_dir


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))


def test_two_at_once_build_once() -> None:
    built: list[Path] = []
    begun, go_on = threading.Event(), threading.Event()

    def build(directory: Path) -> None:
        built.append(directory)
        begun.set()
        assert go_on.wait(10)
        (directory / "thing").write_text("made")

    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(build_once("thing", build))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert not (cache_dir() / "thing").exists()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(built) == 1
    assert found == [cache_dir() / "thing"] * 2
    assert (found[0] / "thing").read_text() == "made"


def test_a_failed_build_leaves_nothing_and_may_be_tried_again() -> None:
    def fail(directory: Path) -> None:
        (directory / "half").touch()
        raise OSError("no network")

    with pytest.raises(OSError, match="no network"):
        build_once("thing", fail)
    assert [path.name for path in cache_dir().iterdir()] == ["locks"]
    assert build_once("thing", lambda directory: None).is_dir()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden"])
def test_names_stay_inside(name: str) -> None:
    with pytest.raises(ValueError, match="not a cache name"):
        build_once(name, lambda directory: None)
