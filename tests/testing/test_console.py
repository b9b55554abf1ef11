"""The console's reading: one stream over several files."""

from pathlib import Path

from sealane.testing.console import ConsoleLog


def test_a_line_cut_by_the_migration_is_whole_again(tmp_path: Path) -> None:
    source, destination = tmp_path / "a", tmp_path / "b"
    source.write_bytes(b"SEALANE-GUEST READY\r\ntick 1\r\ntick 2\r\nti")
    destination.write_bytes(b"ck 3\r\nchecked 9 pages ok\r\ntick 4\r\ntick 5")
    console = ConsoleLog(source, destination)
    assert console.ticks == [1, 2, 3, 4]
    assert console.is_contiguous
    assert console.checks == 1
    assert ConsoleLog(destination).ticks == [4]


def test_lost_and_repeated_execution_show(tmp_path: Path) -> None:
    (tmp_path / "lost").write_text("tick 1\ntick 3\n")
    (tmp_path / "twice").write_text("tick 1\ntick 2\ntick 2\n")
    assert not ConsoleLog(tmp_path / "lost").is_contiguous
    assert not ConsoleLog(tmp_path / "twice").is_contiguous
    assert ConsoleLog(tmp_path / "absent").last_tick == 0
