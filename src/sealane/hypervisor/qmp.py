"""QEMU over QMP: what it is, its run state, and its migrations."""

import asyncio
import contextlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final, cast

from sealane.errors import SealaneError, make_error
from sealane.hypervisor.driver import (
    INACTIVE_STATUSES,
    TERMINAL_STATUSES,
    MigrationParameters,
    MigrationSettings,
    MigrationStatus,
    QmpEvent,
    VmDescription,
)
from sealane.hypervisor.qmp_connection import EventStream, QmpConnection, as_dict, as_float, as_int
from sealane.hypervisor.stranded import is_stranded, let_run
from sealane.hypervisor.unshared import believes_in_postcopy, run_unshared
from sealane.limits import QMP_TIMEOUT_S

# `max-bandwidth` is a size (uint64); QEMU computes with it in int64 (migration/migration.c, migration_rate_set).
BANDWIDTH_UNBOUNDED: Final = 2**63 - 1
QEMU_DEFAULT_DOWNTIME_LIMIT_MS: Final = 300
# How often to look where MIGRATION events are off (a migration that something else began).
BLIND_LOOK_INTERVAL_S: Final = 0.1
# A QEMU whose sockets were closed pauses its postcopy at once.
_PAUSES_BY_ITSELF_S: Final = 2.0
_LETS_GO_WITHIN_S: Final = 5.0

_BEGINNING_STATUSES: Final = frozenset({"setup", "active"})
_SET_UP_S: Final = 0.5
_ENDED: Final = {"completed": "completed already", "failed": "failed", "cancelled": "was cancelled"}

# QEMU's default: how far auto-converge slows a guest down at first; it goes on in steps of `cpu-throttle-increment`.
THROTTLE_INITIAL_PERCENT: Final = 20
# Capabilities that are an error where they are wanted and this QEMU has none of them.
_REFUSED_WITHOUT: Final = ("events", "return-path", "multifd", "auto-converge", "postcopy-ram", "postcopy-preempt")

# Parameters that an earlier migration, or a person, may have left; only those that this QEMU knows are sent.
_PARAMETER_DEFAULTS: Final[Mapping[str, object]] = {
    "multifd-compression": "none",
    "max-postcopy-bandwidth": 0,
    "avail-switchover-bandwidth": 0,
    "tls-creds": "",
    "tls-hostname": "",
    "tls-authz": "",
    "mode": "normal",
    "cpu-throttle-initial": THROTTLE_INITIAL_PERCENT,
    "cpu-throttle-increment": 10,
    "max-cpu-throttle": 99,
}
# All that `configure_migration` may set, and `restore_migration` puts back.
_PARAMETERS_SET: Final = frozenset({*_PARAMETER_DEFAULTS, "max-bandwidth", "downtime-limit", "multifd-channels"})


def _as_dicts(value: object) -> list[dict[str, object]]:
    return [as_dict(item) for item in value] if isinstance(value, list) else []


class QmpMachine(QmpConnection):
    """One QEMU over its QMP socket; a `VmDriver`. Use `async with QmpMachine.connect(path)`."""

    def __init__(self, path: str, timeout_s: float = QMP_TIMEOUT_S) -> None:
        super().__init__(path, timeout_s)
        self._has_events = False

    # The VM

    async def describe(self) -> VmDescription:
        """Who and what the VM is; about ten short commands."""
        version = as_dict(as_dict(await self.execute("query-version")).get("qemu"))
        memory = as_dict(await self.execute("query-memory-size-summary"))
        machine = await self.execute("qom-get", {"path": "/machine", "property": "type"})
        return VmDescription(
            name=cast(str | None, as_dict(await self.execute("query-name")).get("name")),
            uuid=str(as_dict(await self.execute("query-uuid")).get("UUID")),
            qemu_version=(as_int(version.get("major")), as_int(version.get("minor")), as_int(version.get("micro"))),
            machine_type=str(machine).removesuffix("-machine"),
            memory_bytes=as_int(memory.get("base-memory")) + as_int(memory.get("plugged-memory")),
            cpus=len(_as_dicts(await self.execute("query-cpus-fast"))),
            run_state=await self.run_state(),
            accelerator="kvm" if as_dict(await self.execute("query-kvm")).get("enabled") else "tcg",
            capabilities=frozenset(await self._capabilities()),
            pid=self.pid,
            migration_status=(await self.migration_status()).status,
        )

    async def run_state(self) -> str:
        """QEMU's RunState: "running", "paused", "inmigrate", "finish-migrate", "postmigrate", …."""
        return str(as_dict(await self.execute("query-status")).get("status"))

    async def resume(self) -> None:
        """Let the guest run (`cont`), also where QEMU is `stranded` in a switch that failed."""
        try:
            await self.execute("cont")
        except SealaneError as error:
            if error.code != "vm.qmp" or not await is_stranded(self):
                raise
            await let_run(self, f"{self.path}.gdb", self._timeout_s)

    async def stop(self) -> None:
        """Pause the guest; while it is awaited (inmigrate): do not start it once it has arrived."""
        await self.execute("stop")

    async def quit(self) -> None:
        """End QEMU and wait until it has closed the connection."""
        try:
            await self.execute("quit")
        except SealaneError as error:
            # it may end before it answers; that the connection ends is known before it has ended
            if error.code != "vm.unreachable" or self.is_open:
                raise
        try:
            async with asyncio.timeout(self._timeout_s):
                await self.closed()
        except TimeoutError:
            raise make_error("vm.unreachable", f"QEMU did not end within {self._timeout_s:g} s") from None

    # Migration

    async def _capabilities(self) -> dict[str, bool]:
        answer = _as_dicts(await self.execute("query-migrate-capabilities"))
        return {str(item["capability"]): bool(item["state"]) for item in answer}

    async def configure_migration(self, parameters: MigrationParameters, *, incoming: bool) -> None:
        """Set what the hand-over needs and put all else back to QEMU's defaults.

        `late-block-activate` keeps an incoming VM from locking its disks before it is resumed, so that the source can
        still take them back. An incoming VM is told to `stop`, which in state "inmigrate" means: do not start by
        yourself when all has arrived, whatever the command line says (monitor/qmp-cmds.c, qmp_stop).
        """
        await self._wait_let_go()
        known = await self._capabilities()
        wanted = {
            "events": True,
            "return-path": True,
            "validate-uuid": True,
            "pause-before-switchover": not incoming,
            "late-block-activate": incoming,
            "multifd": parameters.multifd_channels > 0,
            "auto-converge": parameters.throttle_max_percent is not None,
            "postcopy-ram": parameters.postcopy,
            "postcopy-preempt": parameters.postcopy and parameters.postcopy_preempt,
        }
        missing = sorted(name for name in _REFUSED_WITHOUT if wanted[name] and name not in known)
        if missing:
            raise make_error("check.capabilities", f"this QEMU has no {', '.join(missing)}")
        states = [{"capability": name, "state": wanted.get(name, False)} for name in sorted(known)]
        try:
            await self.execute("migrate-set-capabilities", {"capabilities": states})
        except SealaneError as error:
            if parameters.postcopy and error.code == "vm.qmp":  # a destination asks the kernel for userfaultfd here
                raise make_error("check.postcopy", error.detail) from error
            raise
        await self._set_parameters(parameters)
        if incoming:
            await self.stop()
        self._has_events = True

    async def _set_parameters(self, parameters: MigrationParameters) -> None:
        known = as_dict(await self.execute("query-migrate-parameters"))
        values: dict[str, object] = {name: value for name, value in _PARAMETER_DEFAULTS.items() if name in known}
        values["max-bandwidth"] = parameters.max_bandwidth_bytes_per_s or BANDWIDTH_UNBOUNDED
        values["downtime-limit"] = parameters.downtime_limit_ms or QEMU_DEFAULT_DOWNTIME_LIMIT_MS
        if parameters.postcopy:  # pages that the guest waits for are bounded too; 0 is unbounded here
            values["max-postcopy-bandwidth"] = parameters.max_bandwidth_bytes_per_s
        if parameters.throttle_max_percent is not None:
            values["max-cpu-throttle"] = parameters.throttle_max_percent
            values["cpu-throttle-initial"] = min(THROTTLE_INITIAL_PERCENT, parameters.throttle_max_percent)
        if parameters.multifd_channels:
            values["multifd-channels"] = parameters.multifd_channels
        await self.execute("migrate-set-parameters", values)

    async def migration_settings(self) -> MigrationSettings:
        """What `configure_migration` will change, as it is now."""
        capabilities = await self._capabilities()
        parameters = as_dict(await self.execute("query-migrate-parameters"))
        return MigrationSettings(
            frozenset(name for name, is_on in capabilities.items() if is_on),
            {name: parameters[name] for name in sorted(_PARAMETERS_SET & parameters.keys())},
        )

    async def restore_migration(self, settings: MigrationSettings) -> None:
        """Put back what differs from `settings`. QEMU refuses it (`vm.qmp`) while a migration is under way.

        A capability left on outlives Sealane's migration: with `pause-before-switchover` a person's own `migrate` would wait in
        "pre-switchover" for ever.
        """
        await self._wait_let_go()
        now = await self.migration_settings()
        known = await self._capabilities()
        changed = sorted((now.capabilities ^ settings.capabilities) & known.keys())
        if changed:
            states = [{"capability": name, "state": name in settings.capabilities} for name in changed]
            await self.execute("migrate-set-capabilities", {"capabilities": states})
        if "events" in changed:
            self._has_events = "events" in settings.capabilities
        values = {name: settings.parameters.get(name, value) for name, value in now.parameters.items()}
        if values != now.parameters:
            differing = {name: value for name, value in values.items() if value != now.parameters[name]}
            await self.execute("migrate-set-parameters", differing)

    async def _wait_let_go(self) -> None:
        """Wait until QEMU has cleaned up after its last migration; raises `vm.qmp` where it does not.

        It says "failed" or "cancelled" before that, and takes other capabilities then. Told in between that there is no multifd, it
        leaves multifd's channels as they are, and aborts itself, with the VM, where it finds them later (migration_cleanup,
        multifd_send_shutdown, and the assertion of yank_unregister_instance). That instance goes last.
        """
        deadline = asyncio.get_running_loop().time() + _LETS_GO_WITHIN_S
        while {"type": "migration"} in _as_dicts(await self.execute("query-yank")):
            if asyncio.get_running_loop().time() > deadline:
                raise make_error("vm.qmp", "QEMU has not let go of its last migration")
            await asyncio.sleep(BLIND_LOOK_INTERVAL_S)

    async def set_bandwidth(self, bytes_per_s: int) -> None:
        """Bound a copy, also one that is under way, and what a postcopy's guest waits for; 0 is unbounded."""
        values = {"max-bandwidth": bytes_per_s or BANDWIDTH_UNBOUNDED, "max-postcopy-bandwidth": bytes_per_s}
        await self.execute("migrate-set-parameters", values)

    async def migrate(self, uri: str) -> None:
        """Start to send the VM; `wait_migration` tells how it goes on."""
        await self.execute("migrate", {"uri": uri})

    async def migrate_incoming(self, uri: str) -> None:
        """Listen on `uri`. A QEMU whose stream fails says why in its log and exits, also when no agent is left to end it."""
        await self.execute("migrate-incoming", {"uri": uri})

    async def migrate_continue(self) -> None:
        """Let a source that waits in "pre-switchover" send the rest."""
        await self.execute("migrate-continue", {"state": "pre-switchover"})

    # Postcopy

    async def start_postcopy(self) -> None:
        """Stop the VM and let QEMU switch to postcopy; it then waits in "pre-switchover" as at any other switch-over.

        The VM is stopped by us, and not by QEMU's switch: a VM that ran when a switch began is resumed by QEMU itself where
        the switch fails, also after the destination has all that it needs to run (migration/migration.c, postcopy_start and
        migration_iteration_finish). One that was paused stays paused.
        """
        await self.stop()
        await self.execute("migrate-start-postcopy")

    async def postcopy_channels(self) -> int:
        """How many channels a postcopy of this QEMU has, as it was configured."""
        return 2 if (await self._capabilities()).get("postcopy-preempt") else 1

    async def pause_postcopy(self) -> None:
        """Break the channels, where QEMU has not seen yet that they are broken, and wait for "postcopy-paused"."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_PAUSES_BY_ITSELF_S):
                await self._wait_paused()
            return
        await self.execute("migrate-pause")
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._wait_paused()
        except TimeoutError:
            raise make_error("migration.qemu-failed", "QEMU does not pause its postcopy") from None

    async def _wait_paused(self) -> None:
        while (status := (await self.migration_status()).status) != "postcopy-paused":
            if status in INACTIVE_STATUSES:
                raise make_error("migration.qemu-failed", f"QEMU says of its postcopy: {status}")
            await asyncio.sleep(BLIND_LOOK_INTERVAL_S)

    async def recover_incoming(self, uri: str) -> None:
        """A destination whose lanes are gone listens on `uri` for the source's other half.

        Out of band: its main thread may wait for a page itself, and then does nothing else until the halves are joined.
        """
        last = make_error("migration.qemu-failed", "QEMU does not pause its postcopy")
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    try:
                        await self.execute_out_of_band("migrate-recover", {"uri": uri})
                        return
                    except SealaneError as error:
                        if error.code != "vm.qmp":
                            raise
                        last = error  # not paused yet: it may not have seen that its lanes are gone
                    with contextlib.suppress(SealaneError):
                        await self.execute_out_of_band("migrate-pause")
                    await asyncio.sleep(BLIND_LOOK_INTERVAL_S)
        except TimeoutError:
            raise last from None

    async def recover_outgoing(self, uri: str) -> None:
        """A source in "postcopy-paused" goes on by `uri`; `wait_migration` tells how."""
        await self.execute("migrate", {"uri": uri, "resume": True})

    async def believes_in_postcopy(self) -> bool:
        """Whether QEMU takes its VM to be in two halves."""
        return await believes_in_postcopy(self)

    async def run_unshared(self) -> None:
        """Let a source run its VM whose other half is nowhere (`unshared`), whatever QEMU believes; again, it does no harm.

        Only on the destination's word that it never ran the VM: elsewhere there would be two. Raises `vm.qmp` and what
        `pause_postcopy` does where it stays paused.
        """
        if await self.run_state() == "running":
            return
        await self.pause_postcopy()
        await run_unshared(self, f"{self.path}.gdb", self._timeout_s)

    async def cancel_migration(self) -> None:
        """End an outgoing migration and wait until it has ended; QEMU then lets a guest that ran before run again.

        One that is `stranded` has ended, whatever it says.
        """
        status = (await self._past_its_beginning()).status
        if status not in INACTIVE_STATUSES and not await is_stranded(self):
            await self.execute("migrate_cancel")
            try:
                status = (await self.wait_migration(TERMINAL_STATUSES, self._timeout_s)).status
            except SealaneError:
                if not await is_stranded(self):
                    raise
        if status == "failed":
            await self._finish_failed()

    async def _past_its_beginning(self) -> MigrationStatus:
        """The status once channels had time to be set up, where the migration has several.

        Cancelled at once, QEMU may wait for its channels' threads for ever and stay "cancelling": in one of ten tries
        with 7.2 and four of ten with 10.0 on a busy machine, in none after half a second.
        """
        look = await self.migration_status()
        if look.status not in _BEGINNING_STATUSES or not (await self._capabilities()).get("multifd", False):
            return look
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SET_UP_S):  # also where it does not get so far
                while look.status in _BEGINNING_STATUSES and (look.total_ms or 0) < _SET_UP_S * 1000:
                    await asyncio.sleep(BLIND_LOOK_INTERVAL_S)
                    look = await self.migration_status()
        return look

    async def _finish_failed(self) -> None:
        """See a failed migration to its end, so that the guest can run again.

        A multifd channel that breaks while QEMU waits in "pre-switchover" makes the migration failed, and its thread
        waits on: the guest stays stopped for ever, and `cont` is refused ("Migration is not finalized yet"). The command
        that lets it go on asks only that it be told the present state (QEMU 10.0, migration/migration.c,
        qmp_migrate_continue and migration_maybe_pause). What is said too much is forgotten by the next migration.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                while await self.run_state() == "finish-migrate":
                    await self.execute("migrate-continue", {"state": "failed"})
                    await asyncio.sleep(BLIND_LOOK_INTERVAL_S)
        except TimeoutError:
            raise make_error("migration.qemu-failed", "the failed migration does not end") from None

    async def migration_status(self) -> MigrationStatus:
        """How far the migration is; status "none" before the first one."""
        answer = as_dict(await self.execute("query-migrate"))
        ram = as_dict(answer.get("ram"))
        page_bytes = as_int(ram.get("page-size")) or 4096
        has_rate = "mbps" in ram
        return MigrationStatus(
            status=str(answer.get("status", "none")),
            total_ms=as_int(answer["total-time"]) if "total-time" in answer else None,
            downtime_ms=as_int(answer["downtime"]) if "downtime" in answer else None,
            ram_total=as_int(ram.get("total")),
            ram_remaining=as_int(ram.get("remaining")),
            ram_transferred=as_int(ram.get("transferred")),
            iteration=as_int(ram.get("dirty-sync-count")),
            dirty_rate_bytes_per_s=float(as_int(ram.get("dirty-pages-rate")) * page_bytes) if has_rate else None,
            rate_bytes_per_s=as_float(ram["mbps"]) * 1e6 / 8 if has_rate else None,
            throttle_percent=as_int(answer["cpu-throttle-percentage"]) if "cpu-throttle-percentage" in answer else None,
            postcopy_requests=as_int(ram["postcopy-requests"]) if "postcopy-requests" in ram else None,
            error=cast(str | None, answer.get("error-desc")),
        )

    async def wait_migration(self, statuses: Collection[str], timeout_s: float | None = None) -> MigrationStatus:
        """Wait until the migration is (or passes through) one of `statuses`.

        Raises `migration.qemu-failed` when it ends in another way or `timeout_s` is over, `vm.unreachable` when QEMU
        goes away. Driven by MIGRATION events; looks ten times a second only where a QEMU has them switched off.
        """
        stream = self.events()
        if not self._has_events:
            self._has_events = (await self._capabilities()).get("events", False)
        seen = ""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    look = await self.migration_status()
                    if look.status in statuses:
                        return look
                    if look.status in TERMINAL_STATUSES:
                        raise make_error("migration.qemu-failed", look.error or f"the migration {_ENDED[look.status]}")
                    if seen in statuses:
                        return replace(look, status=seen)
                    seen = await self._next_migration_status(stream)
        except TimeoutError:
            raise make_error(
                "migration.qemu-failed", f"not {' or '.join(sorted(statuses))} in {timeout_s:g} s"
            ) from None

    async def _next_migration_status(self, stream: EventStream) -> str:
        try:
            async with asyncio.timeout(None if self._has_events else BLIND_LOOK_INTERVAL_S):
                async for event in stream:
                    if isinstance(event, QmpEvent) and event.name == "MIGRATION":
                        return str(event.data.get("status"))
        except TimeoutError:
            return ""
        raise make_error("vm.unreachable", "QEMU ended during the migration")
