"""The process of a launched VM, told apart from all others that had its pid or will have it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LaunchedMachine:
    """The process that holds a launched VM; with its start time (clock ticks since boot) the pid is unmistakable."""

    pid: int
    start_time_ticks: int


def start_time_ticks(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat (proc(5)); None when there is no such process, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text[text.rindex(")") + 2 :].split()
    return None if fields[0] in {"Z", "X"} else int(fields[19])
