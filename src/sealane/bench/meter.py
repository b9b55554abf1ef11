"""What processes use while something runs: CPU seconds and peak memory, read from /proc a hundred times a second."""

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

_EVERY_S: Final = 0.01
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass
class Usage:
    """One process; CPU has the resolution of the kernel's clock tick."""

    first_cpu_s: float
    last_cpu_s: float
    peak_rss_bytes: int = 0

    @property
    def cpu_s(self) -> float:
        """What it used while it was watched."""
        return self.last_cpu_s - self.first_cpu_s


@dataclass
class Meter:
    """Watches processes by name until it is left; `watch` adds one at any time, also one that is yet to be born."""

    usages: dict[str, Usage] = field(default_factory=dict)
    _pids: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> "Meter":
        self._thread = threading.Thread(target=self._watch_all, name="meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def watch(self, name: str, pid: int, *, from_birth: bool = False) -> None:
        """Count this process from now on, or from its birth."""
        now = _cpu_s(pid)
        if now is not None:
            self.usages[name] = Usage(0.0 if from_birth else now, now)
            self._pids[name] = pid

    def _watch_all(self) -> None:
        while not self._stop.wait(_EVERY_S):
            for name, pid in list(self._pids.items()):
                self._look(name, pid)

    def _look(self, name: str, pid: int) -> None:
        used = _cpu_s(pid)
        if used is not None:
            usage = self.usages[name]
            usage.last_cpu_s = max(usage.last_cpu_s, used)
            usage.peak_rss_bytes = max(usage.peak_rss_bytes, _peak_rss_bytes(pid))


def _cpu_s(pid: int) -> float | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _peak_rss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def wall_s() -> float:
    """The wall clock, which QEMU's events are stamped with."""
    return time.time()
