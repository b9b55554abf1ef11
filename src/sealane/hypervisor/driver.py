"""What the agent needs of a hypervisor: plain values and the `VmDriver` protocol that every driver satisfies.

Events are in the past tense and arrive in the order in which the hypervisor sent them; the last one is always `Closed`.
"""

from collections.abc import AsyncIterator, Collection, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

# The states of a migration in which QEMU does nothing more with it (qapi/migration.json, MigrationStatus).
TERMINAL_STATUSES: Final = frozenset({"completed", "failed", "cancelled"})
# Those, and the absence of any.
INACTIVE_STATUSES: Final = TERMINAL_STATUSES | {"none"}


@dataclass(frozen=True)
class VmDescription:
    """A VM as its hypervisor describes it now; `accelerator` is "kvm" or "tcg", `pid` the process that holds the VM."""

    name: str | None
    uuid: str
    qemu_version: tuple[int, int, int]
    machine_type: str
    memory_bytes: int
    cpus: int
    run_state: str
    accelerator: str
    capabilities: frozenset[str]
    pid: int
    migration_status: str


@dataclass(frozen=True)
class MigrationParameters:
    """What both ends must agree on. 0 multifd channels: one stream; 0 bandwidth: unbounded; None: QEMU's own limit.

    `throttle_max_percent`: QEMU may slow the guest down so far where it writes faster than the copy goes (auto-converge);
    None: not at all. The source's alone. `postcopy` only allows it; `postcopy_preempt` gives wanted pages a channel of their own.
    """

    multifd_channels: int = 0
    max_bandwidth_bytes_per_s: int = 0
    downtime_limit_ms: int | None = None
    throttle_max_percent: int | None = None
    postcopy: bool = False
    postcopy_preempt: bool = False


@dataclass(frozen=True)
class MigrationSettings:
    """What a QEMU is set to for its next migration, as far as a driver changes it: so that it can be put back.

    `capabilities` are those that are on, `parameters` those that a driver sets, each with its value.
    """

    capabilities: frozenset[str]
    parameters: Mapping[str, object]


@dataclass(frozen=True)
class MigrationStatus:
    """One look at a migration; sizes in bytes of guest RAM, `iteration` is QEMU's dirty-sync-count."""

    status: str
    total_ms: int | None = None
    downtime_ms: int | None = None
    ram_total: int = 0
    ram_remaining: int = 0
    ram_transferred: int = 0
    iteration: int = 0
    dirty_rate_bytes_per_s: float | None = None
    rate_bytes_per_s: float | None = None
    throttle_percent: int | None = None
    postcopy_requests: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class QmpEvent:
    """Something that QEMU said happened; `timestamp_s` is QEMU's wall clock."""

    name: str
    data: Mapping[str, object]
    timestamp_s: float


@dataclass(frozen=True)
class Closed:
    """The last event: the hypervisor closed the connection (or we did); nothing follows."""

    detail: str = ""


VmEvent = QmpEvent | Closed


class VmDriver(Protocol):
    """One VM under control. All calls may raise `vm.unreachable` (gone, hung) or `vm.qmp` (refused)."""

    async def describe(self) -> VmDescription:
        """Who and what the VM is."""

    async def run_state(self) -> str:
        """QEMU's RunState: "running", "paused", "inmigrate", "postmigrate", …."""

    async def configure_migration(self, parameters: MigrationParameters, *, incoming: bool) -> None:
        """Set every capability and parameter that matters, so that nothing is left from an earlier migration."""

    async def migration_settings(self) -> MigrationSettings:
        """What `configure_migration` will change."""

    async def restore_migration(self, settings: MigrationSettings) -> None:
        """Put back what `configure_migration` changed; only while no migration is under way."""

    async def set_bandwidth(self, bytes_per_s: int) -> None:
        """Bound a copy, also one that is under way; 0 is unbounded."""

    async def migrate(self, uri: str) -> None:
        """Start to send the VM to `uri`."""

    async def migrate_incoming(self, uri: str) -> None:
        """Start to listen on `uri` for the VM."""

    async def migrate_continue(self) -> None:
        """Let a source that waits in "pre-switchover" send the rest."""

    async def start_postcopy(self) -> None:
        """Let a source switch to postcopy as soon as it can; the VM is stopped for it, and the switch waits as any other."""

    async def pause_postcopy(self) -> None:
        """Break the channels of a postcopy, at either end, and return once QEMU keeps its half for a recovery."""

    async def recover_incoming(self, uri: str) -> None:
        """Let a destination whose postcopy is paused listen on `uri` for the source's other half."""

    async def recover_outgoing(self, uri: str) -> None:
        """Let a source whose postcopy is paused go on by `uri`."""

    async def cancel_migration(self) -> None:
        """End a migration in progress and wait until it has ended; nothing happens when there is none."""

    async def migration_status(self) -> MigrationStatus:
        """How far the migration is."""

    async def wait_migration(self, statuses: Collection[str], timeout_s: float | None = None) -> MigrationStatus:
        """Wait until the migration is in one of `statuses`; raises `migration.qemu-failed` when it ends otherwise."""

    async def resume(self) -> None:
        """Let the guest run."""

    async def stop(self) -> None:
        """Pause the guest; in an incoming VM: do not start it once it has arrived."""

    async def quit(self) -> None:
        """End the hypervisor's process."""

    def events(self) -> AsyncIterator[VmEvent]:
        """Events from now on; the last one is `Closed`."""

    @property
    def is_closed(self) -> bool:
        """Whether the connection has ended."""

    async def closed(self) -> None:
        """Return once the connection has ended."""
