"""What the demonstration saw, as checks that can fail, and how it is told."""

from dataclasses import dataclass
from typing import Literal

from sealane.cli import format as words
from sealane.cli.output import Output
from sealane.errors import make_error
from sealane.testing.attested import LEVEL


@dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was seen."""

    name: str
    held: bool
    text: str


@dataclass
class Report:
    """What was observed; None where the demonstration did not come so far."""

    qemu_version: str | None = None
    accel: str | None = None
    accel_reason: str | None = None
    network: str | None = None
    capture: Literal["tcpdump", "relay"] | None = None
    total_ms: float | None = None
    downtime_ms: float | None = None
    bytes_wire: int | None = None
    kex_group: str | None = None
    cipher: str | None = None
    multifd_channels: int | None = None
    ticks: int | None = None
    ticks_after: int = 0
    guest_alive: bool | None = None
    source_stopped: bool | None = None
    memory_checkable: bool = True
    memory_intact: bool | None = None
    captured_bytes: int | None = None
    canary_count: int | None = None
    plain_captured_bytes: int | None = None
    plain_canary_count: int | None = None
    verdict: dict[str, object] | None = None
    level: int | None = None
    receipt: dict[str, object] | None = None
    receipt_problems: list[str] | None = None
    problem: str = ""

    def checks(self) -> list[Check]:
        """Every check in the order of the story. What was not observed did not hold."""
        return [
            Check("guest_alive", self.guest_alive is True, self._guest_text()),
            Check(
                "source_stopped",
                self.source_stopped is True,
                "its QEMU on host-a is gone" if self.source_stopped else "its QEMU on host-a was not seen to end",
            ),
            *(
                [Check("memory_intact", self.memory_intact is True, self._memory_text())]
                if self.memory_checkable
                else []
            ),
            Check("capture_whole", self._is_whole, self._capture_text()),
            Check("canary_on_wire", self.canary_count == 0 and self._is_whole, self._canary_text()),
            Check("canary_on_plain_wire", bool(self.plain_canary_count), self._plain_text()),
            Check("attested", self.level == LEVEL, self._verdict_text()),
            Check("receipt_verified", self.receipt_verified is True, self._receipt_text()),
        ]

    @property
    def receipt_verified(self) -> bool | None:
        """Whether both hosts' receipts hold, and each host has the other's; None where the demo did not come so far."""
        return None if self.receipt_problems is None else not self.receipt_problems

    @property
    def failures(self) -> list[Check]:
        """The checks that did not hold."""
        return [check for check in self.checks() if not check.held]

    @property
    def status(self) -> Literal["ok", "failed"]:
        """`ok` only where every check held and nothing went wrong on the way."""
        return "failed" if self.problem or self.failures else "ok"

    @property
    def _is_whole(self) -> bool:
        """Whether the eavesdropper heard at least what was sent; packets' own headers only add to it."""
        return bool(self.bytes_wire and self.captured_bytes is not None and self.captured_bytes >= self.bytes_wire)

    def as_dict(self) -> dict[str, object]:
        """The report as `--json` writes it."""
        return {
            "status": self.status,
            "total_ms": self.total_ms,
            "downtime_ms": self.downtime_ms,
            "bytes_wire": self.bytes_wire,
            "kex_group": self.kex_group,
            "cipher": self.cipher,
            "guest_alive": self.guest_alive,
            "source_stopped": self.source_stopped,
            "memory_intact": self.memory_intact,
            "canary_on_wire": None if self.canary_count is None else self.canary_count > 0,
            "canary_on_plain_wire": None if self.plain_canary_count is None else self.plain_canary_count > 0,
            "capture": self.capture,
            "captured_bytes": self.captured_bytes,
            "plain_captured_bytes": self.plain_captured_bytes,
            "ticks": self.ticks,
            "multifd_channels": self.multifd_channels,
            "network": self.network,
            "qemu_version": self.qemu_version,
            "accel": self.accel,
            "accel_reason": self.accel_reason,
            "verdict": self.verdict,
            "level": self.level,
            "receipt": self.receipt,
            "receipt_verified": self.receipt_verified,
            "failed_checks": [check.name for check in self.failures],
            "problem": self.problem or None,
        }

    def _guest_text(self) -> str:
        if not self.guest_alive:
            return f"the counter stopped, or has a gap, after {self.ticks or 0} ticks"
        return f"it counted on, 1 to {self.ticks}, none lost, none twice; the last {self.ticks_after} on host-b"

    def _memory_text(self) -> str:
        if not self.memory_intact:
            return "the guest found memory changed, or did not come to check all of it on host-b"
        return "the guest checked all of its pages on host-b: each as it was written"

    def _capture_text(self) -> str:
        if self.captured_bytes is None:
            return "nothing was overheard"
        heard, sent = words.network_bytes(self.captured_bytes), words.network_bytes(self.bytes_wire or 0)
        return f"{heard} overheard where {sent} were sent" + ("" if self._is_whole else ": not everything was heard")

    def _canary_text(self) -> str:
        if self.canary_count is None:
            return "not looked for"
        if self.canary_count:
            return f"found on the wire {_grouped(self.canary_count)} times"
        return "not found on the wire"

    def _receipt_text(self) -> str:
        if self.receipt_problems is None:
            return "not looked at"
        if self.receipt_problems:
            return self.receipt_problems[0]
        return "both hosts signed what happened, and each holds the other's signature; verified without an agent"

    def _verdict_text(self) -> str:
        if self.verdict is None:
            return "the hosts did not attest to each other"
        root, production = self.verdict["root"], self.verdict["production_level"]
        return f"level {self.level}, rooted in {root}: a test root, which the default policy refuses (production: {production})"

    def _plain_text(self) -> str:
        if self.plain_canary_count is None:
            return "QEMU's plain migration was not overheard"
        heard = words.network_bytes(self.plain_captured_bytes or 0)
        if not self.plain_canary_count:
            return f"not found in {heard} of QEMU's plain migration either: the search proves nothing"
        return f"found {_grouped(self.plain_canary_count)} times in {heard} of QEMU's plain migration"


# What each check is called in front of people.
_LABELS = {
    "guest_alive": "guest",
    "source_stopped": "source",
    "memory_intact": "memory",
    "capture_whole": "capture",
    "canary_on_wire": "secret",
    "canary_on_plain_wire": "contrast",
    "attested": "verdict",
    "receipt_verified": "receipt",
}


def conclude(report: Report, out: Output) -> int:
    """Say what was shown and what was not, and give the exit status."""
    out.line()
    out.line("What was seen")
    for check in report.checks():
        out.line(f"{'✓' if check.held else '✗'} {_LABELS[check.name]:<{8}} {check.text}")
    if not report.memory_checkable:
        out.line(
            f"! {'memory':<8} not checked: QEMU {report.qemu_version} loses written pages under TCG; 9.0 and later do not"
        )
    out.line()
    out.line("What was not shown")
    out.line(
        "  The hosts' TPMs are programs of this machine, and the demo alone accepts their root: they prove that quotes are"
    )
    out.line(
        "  asked for and checked, not what a host runs. And both hosts are this one machine: the times are no benchmark."
    )
    out.line()
    if report.status == "ok":
        total, down = words.duration((report.total_ms or 0) / 1000), words.duration((report.downtime_ms or 0) / 1000)
        out.line(f"✓ a running VM crossed in {total}, {down} of it down, and the wire told nothing of its memory")
        return 0
    names = ", ".join(_LABELS[check.name] for check in report.failures) or report.problem
    error = make_error("demo.failed", f"what did not hold: {names}")
    out.error(error, headline="the demonstration failed")
    return error.exit_status


def _grouped(count: int) -> str:
    return f"{count:,}".replace(",", " ")
