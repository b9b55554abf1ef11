"""What a guest said, read from the serial consoles of all the QEMU processes that it lived in."""

import itertools
import re
from pathlib import Path

_TICK = re.compile(r"tick (\d+)")


class ConsoleLog:
    """The consoles of one guest, in the order in which its QEMU processes ran it: source first, then destination.

    The serial port is one stream of bytes that goes on at the destination where the source left off, so the files are
    joined as they are; a line cut in two by the migration is whole again. Read anew at each question.
    """

    def __init__(self, *paths: Path) -> None:
        self._paths = paths

    @property
    def text(self) -> str:
        """Everything said so far."""
        data = b"".join(path.read_bytes() for path in self._paths if path.exists())
        return data.decode(errors="replace").replace("\r", "")

    @property
    def lines(self) -> list[str]:
        """The finished lines."""
        return self.text.split("\n")[:-1]

    @property
    def ticks(self) -> list[int]:
        """The numbers of the ticks, in the order in which they were said."""
        return [int(match[1]) for line in self.lines if (match := _TICK.fullmatch(line))]

    @property
    def last_tick(self) -> int:
        """The last tick's number; 0 before the first."""
        return (self.ticks or [0])[-1]

    @property
    def is_contiguous(self) -> bool:
        """Whether each tick follows the one before: no execution lost, none repeated."""
        ticks = self.ticks
        return all(after == before + 1 for before, after in itertools.pairwise(ticks))

    @property
    def corruptions(self) -> list[str]:
        """Where the worker found memory that differs from what it wrote."""
        return [line for line in self.lines if line.startswith("CORRUPT")]

    @property
    def checks(self) -> int:
        """How often the worker has checked all of its pages and found them right."""
        return sum(bool(re.fullmatch(r"checked \d+ pages ok", line)) for line in self.lines)
