"""The moments of a migration, as its source saw them, and what the migration took."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sealane.host.migration import messages
from sealane.host.migration.enclave_process import EnclaveProcess
from sealane.host.models import NotSent, Result
from sealane.hypervisor.driver import QmpEvent, VmEvent


@dataclass
class Clockwork:
    """Moments on the monotonic clock, in seconds; `requested` is when its turn came, not its time in the queue."""

    requested: float = field(default_factory=time.monotonic)
    copy_started: float | None = None
    vm_stopped: float | None = None
    receipt: float | None = None
    arrived: float | None = None

    def result(self, receipt: messages.Receipt | None, enclave: EnclaveProcess | None, bytes_wire: int) -> Result:
        """By postcopy the copy goes on after the receipt, and a receipt that a cut swallowed leaves the downtime unknown."""
        over = self.arrived or self.receipt or time.monotonic()
        costs: dict[str, Any] = {} if enclave is None else enclave.costs()
        return Result(
            total_ms=(over - self.requested) * 1e3,
            copy_ms=None if self.copy_started is None else (over - self.copy_started) * 1e3,
            downtime_ms=self._downtime_ms(receipt),
            bytes_wire=bytes_wire,
            not_sent=NotSent() if enclave is None else enclave.not_sent,
            **costs,
        )

    def _downtime_ms(self, receipt: messages.Receipt | None) -> float | None:
        if self.vm_stopped is None or self.receipt is None or receipt is None:
            return None
        return max(0.0, (self.receipt - self.vm_stopped) * 1e3 - receipt.since_resume_ms)


def moment_of(name: str, arrived: Iterable[VmEvent]) -> float:
    """When QEMU said that this event happened last, on our monotonic clock; now, where it did not say."""
    stamps = [event.timestamp_s for event in arrived if isinstance(event, QmpEvent) and event.name == name]
    now = time.monotonic()
    return now - max(0.0, time.time() - stamps[-1]) if stamps else now
