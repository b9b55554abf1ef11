"""Nothing is set at a QEMU that has not cleaned up after its last migration: it would end itself, and the VM."""

from typing import Any

import pytest

from sealane.errors import SealaneError
from sealane.hypervisor import qmp
from sealane.hypervisor.driver import MigrationParameters, MigrationSettings
from sealane.hypervisor.qmp import QmpMachine

BEFORE = MigrationSettings(frozenset({"events"}), {"max-bandwidth": 1})
CAPABILITIES = ("events", "multifd", "return-path", "auto-converge", "postcopy-ram", "postcopy-preempt")


class CleaningUp(QmpMachine):
    """A QEMU that says that its migration failed, and has it in hand for so many looks more."""

    def __init__(self, looks: int) -> None:
        self.looks = looks
        self.asked: list[str] = []

    async def execute(self, command: str, arguments: Any = None, **_: Any) -> Any:
        self.asked.append(command)
        if command == "query-yank":
            self.looks -= 1
            return [{"type": "chardev", "id": "c"}] + [{"type": "migration"}] * (self.looks >= 0)
        if command == "query-migrate-capabilities":
            return [{"capability": name, "state": True} for name in CAPABILITIES]
        return {"max-bandwidth": 7}

    @property
    def set(self) -> list[str]:
        return [command for command in self.asked if command.startswith("migrate-set-")]


async def restore(machine: QmpMachine) -> None:
    await machine.restore_migration(BEFORE)


async def configure(machine: QmpMachine) -> None:
    await machine.configure_migration(MigrationParameters(), incoming=False)


@pytest.mark.parametrize("change", [restore, configure])
async def test_it_is_waited_for(change: Any) -> None:
    machine = CleaningUp(3)
    await change(machine)
    assert machine.asked[:4] == ["query-yank"] * 4
    assert machine.set == ["migrate-set-capabilities", "migrate-set-parameters"]


@pytest.mark.parametrize("change", [restore, configure])
async def test_one_that_never_ends_is_left_alone(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "_LETS_GO_WITHIN_S", 0.0)
    machine = CleaningUp(1 << 30)
    with pytest.raises(SealaneError, match="has not let go") as raised:
        await change(machine)
    assert raised.value.code == "vm.qmp"
    assert not machine.set
