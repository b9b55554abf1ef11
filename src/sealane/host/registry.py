"""Which VMs there are, and what is known of each now.

A VM stands in the store (`sealane vm add`) or in `vms.toml`; the file wins, since an operator wrote it. The state is
looked up over QMP when it is asked for, all VMs at once and each within a bound. QMP serves one client, so a VM that a
migration holds is told from the migration.
"""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from sealane.errors import SealaneError, make_error
from sealane.host.config import load_vms
from sealane.host.domains import DomainFinder, DomainVm
from sealane.host.jobs import Jobs
from sealane.host.models import Migration, Vm, VmDefinition, VmState
from sealane.host.store import Store
from sealane.hypervisor.driver import VmDescription
from sealane.hypervisor.qmp import QmpMachine
from sealane.libvirt.domains import DomainUri, is_domain

# A VM that does not answer must not keep a list of a hundred others waiting.
PROBE_TIMEOUT_S: Final = 2.0
# Connections at once; each is a descriptor and some ten short answers.
PROBES_AT_ONCE: Final = 32

Source = Literal["registered", "file", "libvirt"]

# What the user sees while a migration holds the VM; states that are not named show the VM as it was.
_HELD: Final[Mapping[tuple[str, str], VmState]] = {
    ("source", "preparing"): "running",
    ("source", "copying"): "running",
    ("source", "switching-over"): "paused",
    ("source", "handing-over"): "paused",
    ("source", "in-doubt"): "in-doubt",
    ("source", "postcopy"): "paused",
    ("source", "postcopy-paused"): "paused",
    ("destination", "handing-over"): "running",
    ("destination", "postcopy"): "running",
    ("destination", "postcopy-paused"): "paused",
}


def state_of(run_state: str) -> VmState:
    """QEMU's RunState in the interface's words."""
    return {"running": "running", "inmigrate": "incoming"}.get(run_state, "paused")  # type: ignore[return-value]


def is_absent(error: SealaneError) -> bool:
    """Whether an unreachable VM is simply not there: no socket, one that nobody listens on, or one of another process."""
    return isinstance(error.__cause__, FileNotFoundError | ConnectionRefusedError | ProcessLookupError)


class Registry:
    """The VMs of this host."""

    def __init__(
        self,
        store: Store,
        vms_file: Path,
        jobs: Jobs,
        *,
        probe_timeout_s: float = PROBE_TIMEOUT_S,
        libvirt: Sequence[DomainUri] = (),
    ) -> None:
        self._store = store
        self._vms_file = vms_file
        self._jobs = jobs
        self._probe_timeout_s = probe_timeout_s
        self.domains = DomainFinder(libvirt, probe_timeout_s)
        self._probes = asyncio.Semaphore(PROBES_AT_ONCE)

    def definitions(self) -> dict[str, tuple[VmDefinition, Source]]:
        """All VMs by name. `vms.toml` is read anew, so that an edit counts at once; domains are those found last."""
        found: dict[str, tuple[VmDefinition, Source]] = {
            name: (domain.definition, "libvirt") for name, domain in self.domains.found.items()
        }
        found.update({vm.name: (vm, "registered") for vm in self._store.vms()})
        found.update({vm.name: (vm, "file") for vm in load_vms(self._vms_file)})
        return dict(sorted(found.items()))

    def get(self, name: str) -> VmDefinition:
        """The VM of that name; raises `vm.unknown`."""
        return self._get(name)[0]

    def _get(self, name: str) -> tuple[VmDefinition, Source]:
        found = self.definitions().get(name)
        if found is None:
            raise make_error("vm.unknown", f"no VM is called {name}")
        return found

    def add(self, vm: VmDefinition) -> VmDefinition:
        """Register a VM; raises `vm.exists` for its name and for its QMP socket."""
        if is_domain(vm.qmp):
            raise make_error("usage.argument", "domains of libvirt are found, and not registered")
        for known, _source in self.definitions().values():
            if known.name == vm.name:
                raise make_error("vm.exists", f"{vm.name} is there already, with {known.qmp}")
            if known.qmp == vm.qmp:
                raise make_error("vm.exists", f"{known.name} has that QMP socket already")
        self._store.add_vm(vm)
        return vm

    def remove(self, name: str) -> None:
        """Forget a VM (it runs on); raises `vm.unknown`, `vm.busy`, or `usage.argument` for one of `vms.toml`."""
        _vm, source = self._get(name)
        if busy := self._jobs.active_for(name):
            raise make_error("vm.busy", f"{name} is in migration {busy.number} ({busy.state})")
        if source == "libvirt":
            raise make_error("usage.argument", f"{name} is a domain of libvirt", mend="virsh undefine forgets it")
        if source == "file":
            raise make_error("usage.argument", f"{name} stands in {self._vms_file}", mend="remove it from that file")
        self._store.remove_vm(name)

    async def list(self) -> list[Vm]:
        """All VMs with their states."""
        await self.domains.find()
        return list(await asyncio.gather(*(self._look(vm, source) for vm, source in self.definitions().values())))

    async def look(self, name: str) -> Vm:
        """One VM with its state; raises `vm.unknown`."""
        await self.domains.find()
        return await self._look(*self._get(name))

    async def _look(self, vm: VmDefinition, source: Source) -> Vm:
        facts = {**vm.model_dump(), "source": source, "epoch": self._store.epoch(vm.name)}
        if source == "libvirt":
            facts["driver"] = "libvirt"
        held = self._jobs.active_for(vm.name)
        if held is not None and held.state == "queued":
            facts.update(migration=held.id, migration_state=held.state)  # nothing holds the VM yet
        elif held is not None:
            job = self._jobs.job_for(vm.name)
            return Vm.model_validate({**facts, **_held(held, job.description if job else None)})
        if source == "libvirt":
            return Vm.model_validate({**facts, **_of_libvirt(self.domains.found[vm.name])})
        try:
            async with self._probes, QmpMachine.connect(vm.qmp, self._probe_timeout_s) as machine:
                facts.update(_described(await machine.describe()))
        except SealaneError as error:
            facts["state"] = "absent" if is_absent(error) else "unreachable"
        return Vm.model_validate(facts)


def _held(migration: Migration, description: VmDescription | None) -> dict[str, Any]:
    state = _HELD.get((migration.role, migration.state), "incoming")
    about = {"migration": migration.id, "migration_state": migration.state}
    return {**(_described(description) if description else {}), "state": state, **about}


def _of_libvirt(domain: DomainVm) -> dict[str, Any]:
    return {
        "driver": "libvirt",
        "state": domain.state,
        "memory_bytes": domain.facts.memory_bytes,
        "cpus": domain.facts.cpus,
        "machine_type": domain.facts.machine_type,
    }


def _described(description: VmDescription) -> dict[str, Any]:
    return {
        "state": state_of(description.run_state),
        "memory_bytes": description.memory_bytes,
        "cpus": description.cpus,
        "machine_type": description.machine_type,
        "qemu_version": ".".join(str(part) for part in description.qemu_version),
    }
