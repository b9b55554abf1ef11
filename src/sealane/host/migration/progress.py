"""How far a copy is: QEMU's figures, the lanes', and the outlook, as one `Progress`."""

from typing import Any

from sealane.host.migration.convergence import Outlook
from sealane.host.models import NotSent, Progress
from sealane.hypervisor.driver import MigrationStatus


def of_copy(
    status: MigrationStatus, outlook: Outlook, *, bytes_wire: int, not_sent: NotSent, rate_limit: int, **disks: Any
) -> Progress:
    """While the VM runs at the source; `rate_limit` in bytes a second, `disks` Progress's figures of disks that are copied."""
    return Progress(
        bytes_total=status.ram_total,
        bytes_remaining=status.ram_remaining,
        bytes_transferred=status.ram_transferred,
        bytes_wire=bytes_wire,
        not_sent=not_sent,
        rate_bytes_per_s=status.rate_bytes_per_s,
        rate_limit_bytes_per_s=rate_limit,
        dirty_rate_bytes_per_s=status.dirty_rate_bytes_per_s,
        iteration=status.iteration,
        eta_s=outlook.eta_s,
        converges=outlook.converges,
        stalled_s=outlook.stalled_s,
        throttle_percent=status.throttle_percent,
        **disks,
    )


def of_postcopy(before: Progress, status: MigrationStatus, *, bytes_wire: int, rate_limit: int) -> Progress:
    """While the VM runs at the destination: what the copy before came to stays as it was."""
    return before.model_copy(
        update={
            "bytes_remaining": status.ram_remaining,
            "bytes_transferred": status.ram_transferred,
            "bytes_wire": bytes_wire,
            "rate_bytes_per_s": status.rate_bytes_per_s,
            "rate_limit_bytes_per_s": rate_limit,
            "postcopy_requests": status.postcopy_requests,
            "eta_s": None,
            "converges": None,
        }
    )
