"""Agents that tell no QEMU to switch over while there is a certain file: what happens in that moment happens every time."""

import sys
from pathlib import Path

# By its first words a rig knows an agent.
_PROGRAM = """'sealane.cli agent'
import asyncio, pathlib
from sealane.cli.application import main
from sealane.hypervisor.qmp import QmpMachine
{more}
go_on = QmpMachine.migrate_continue
async def held(machine):
    while pathlib.Path({hold!r}).exists():
        await asyncio.sleep(0.01)
    await go_on(machine)
QmpMachine.migrate_continue = held
main()
"""


def held_agent(hold: Path, more: str = "") -> tuple[str, ...]:
    """`program` for a rig: what runs the command line so, after one more statement."""
    return (sys.executable, "-c", _PROGRAM.format(hold=str(hold), more=more))
