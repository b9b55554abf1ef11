"""The domains of this host's libvirtd, found as VMs each time they are asked for.

Where libvirt's binding or its libvirtd is missing there are none: the agent works without. A domain whose name is no VM's name
here (spaces, more than 64 characters), or whose name is registered, is left out and the log says so, once.
"""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Final

import structlog
from pydantic import TypeAdapter, ValidationError

from sealane.errors import SealaneError, printable
from sealane.host.models import Name, VmDefinition, VmState
from sealane.libvirt.domains import DomainFacts, DomainUri
from sealane.libvirt.machine import FoundDomain, daemon_socket, list_domains

_NAME: Final[TypeAdapter[str]] = TypeAdapter(Name)
_log = structlog.get_logger()


@dataclasses.dataclass(frozen=True)
class DomainVm:
    """A domain as a VM, with what libvirt said of it last."""

    definition: VmDefinition
    facts: DomainFacts
    state: VmState


class DomainFinder:
    """What `find` has found last stands in `found`, by name."""

    def __init__(self, uris: Sequence[DomainUri], timeout_s: float) -> None:
        self._uris, self._timeout_s = uris, timeout_s
        self._said: set[str] = set()
        self.found: Mapping[str, DomainVm] = {}

    async def find(self) -> None:
        """Ask every libvirtd; never raises. One that does not answer keeps what it said last out of the list."""
        found: dict[str, DomainVm] = {}
        for listed in await asyncio.gather(*(self._ask(uri) for uri in self._uris)):
            for each in listed:
                if (vm := self._as_vm(each)) is not None:
                    found.setdefault(vm.definition.name, vm)
        self.found = found

    async def _ask(self, uri: DomainUri) -> list[FoundDomain]:
        try:
            daemon_socket(uri)  # else libvirt's client would start a libvirtd for a session
            return await list_domains(uri, self._timeout_s)
        except SealaneError as error:
            self._say_once(uri, error.code)
            return []

    def _as_vm(self, found: FoundDomain) -> DomainVm | None:
        facts = found.facts
        try:
            definition = VmDefinition(
                name=_NAME.validate_python(facts.name),
                qmp=str(facts.address),
                least_level=facts.least_level,
                labels=dict(facts.labels),
            )
        except ValidationError:
            self._say_once(printable(facts.name, 100), "its name is no VM's name")
            return None
        if not facts.is_understood:
            self._say_once(facts.name, "metadata that does not fit: it asks for level 4")
        return DomainVm(definition, facts, found.state)

    def _say_once(self, subject: str, words: str) -> None:
        if (what := f"{subject}: {words}") not in self._said:
            self._said.add(what)
            _log.info("left out by libvirt's driver", subject=subject, reason=words)
