"""A domain under control: libvirt's states in QEMU's words, and a domain that has to go."""

import uuid
from dataclasses import dataclass, field
from typing import Any

import pytest

from sealane.errors import SealaneError
from sealane.libvirt.domains import DomainAddress
from sealane.libvirt.machine import DomainMachine

libvirt = pytest.importorskip("libvirt")
ADDRESS = DomainAddress(uuid.UUID(int=1), "qemu:///system")


def libvirt_error(code: int) -> Exception:
    error: Exception = libvirt.libvirtError("no")
    error.err = (code, 10, "no", 2, None, None, None, -1, -1)  # type: ignore[attr-defined]
    return error


@dataclass
class StandIn:
    """libvirt's connection and its one domain; `refusals` are what its calls to `destroy` raise, in their order."""

    state_now: tuple[int, int] = (1, 0)
    active: bool = True
    persistent: bool = False
    ends_by_itself: bool = False
    refusals: list[Exception] = field(default_factory=list)
    undefined: bool = False

    def lookupByUUIDString(self, identity: str) -> "StandIn":
        return self

    def state(self) -> list[int]:
        return list(self.state_now)

    def isActive(self) -> bool:
        return self.active

    def isPersistent(self) -> bool:
        return self.persistent

    def destroy(self) -> None:
        if self.ends_by_itself:
            self.active = False
        if self.refusals:
            raise self.refusals.pop(0)
        self.active = False

    def undefineFlags(self, flags: int) -> None:
        self.undefined = True


def machine(domain: Any) -> DomainMachine:
    return DomainMachine(domain, ADDRESS, 5.0)


@pytest.mark.parametrize(
    ("state", "reason", "words"),
    [
        ("RUNNING", 1, "running"),
        ("BLOCKED", 0, "running"),
        ("PAUSED", "PAUSED_USER", "paused"),
        ("PAUSED", "PAUSED_MIGRATION", "postmigrate"),
        ("SHUTDOWN", 0, "shutdown"),
        ("PMSUSPENDED", 0, "suspended"),
    ],
)
async def test_only_a_domain_that_runs_is_called_running(state: str, reason: int | str, words: str) -> None:
    number = getattr(libvirt, f"VIR_DOMAIN_{reason}") if isinstance(reason, str) else reason
    assert await machine(StandIn((getattr(libvirt, f"VIR_DOMAIN_{state}"), number))).run_state() == words


@pytest.mark.parametrize(
    ("state", "reason", "anew"),
    [
        ("RUNNING", "RUNNING_BOOTED", True),
        ("RUNNING", "RUNNING_UNPAUSED", False),
        ("RUNNING", "RUNNING_MIGRATION_CANCELED", False),
        ("PAUSED", "PAUSED_MIGRATION", False),
    ],
)
async def test_a_domain_that_was_started_anew_is_told_from_one_that_was_let_run_again(
    state: str, reason: str, anew: bool
) -> None:
    numbers = (getattr(libvirt, f"VIR_DOMAIN_{state}"), getattr(libvirt, f"VIR_DOMAIN_{reason}"))
    assert await machine(StandIn(numbers)).was_started_anew() == anew


@pytest.mark.parametrize("state", ["SHUTOFF", "CRASHED", "NOSTATE"])
async def test_a_domain_without_a_qemu_is_absent(state: str) -> None:
    with pytest.raises(SealaneError) as raised:
        await machine(StandIn((getattr(libvirt, f"VIR_DOMAIN_{state}"), 0))).run_state()
    assert isinstance(raised.value.__cause__, FileNotFoundError)


async def test_a_domain_that_libvirtd_does_not_end_is_not_called_ended() -> None:
    domain = StandIn(refusals=[libvirt_error(libvirt.VIR_ERR_SYSTEM_ERROR)])
    with pytest.raises(SealaneError):
        await machine(domain).destroy(undefine=True)
    assert not domain.undefined


async def test_a_domain_that_libvirtd_ended_in_between_is_forgotten_all_the_same() -> None:
    gone = libvirt_error(libvirt.VIR_ERR_OPERATION_INVALID)
    domain = StandIn(persistent=True, ends_by_itself=True, refusals=[gone])
    await machine(domain).destroy(undefine=True)
    assert domain.undefined


async def test_no_domain_is_nothing_to_end() -> None:
    domain = StandIn(refusals=[libvirt_error(libvirt.VIR_ERR_NO_DOMAIN)])
    await machine(domain).destroy()
    assert not domain.undefined
