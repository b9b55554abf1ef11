"""`docs/faults.md` names only tests and codes that exist, and every fault that is tested stands in it."""

import ast
import re
from pathlib import Path

import pytest

from sealane.errors import CATALOGUE

HERE = Path(__file__).parent
ROWS = [
    [cell.strip() for cell in line.strip("| \n").split(" | ")]
    for line in (HERE.parent.parent / "docs" / "faults.md").read_text().splitlines()
    if line.startswith("|") and "::" in line
]
FAULTS = ("test_lanes.py", "test_channel.py", "test_destination.py", "test_crashes.py", "test_control.py")
# Not faults but the proof that all goes well after them.
NO_FAULTS = {"test_afterwards_it_migrates", "test_hook_agrees", "test_unknown_vm_at_the_source"}


def cases_of(file: str) -> set[str]:
    tree = ast.parse((HERE / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row[0]))
def test_row(row: list[str]) -> None:
    assert len(row) == 4
    file, name = row[3].strip("`").split("::")
    assert name in cases_of(file)
    codes = re.findall(r"`([a-z]+\.[a-z-]+)`", row[1])
    assert codes or row[1].startswith(("none", "closed"))
    assert set(codes) <= set(CATALOGUE)


@pytest.mark.parametrize("file", FAULTS)
def test_every_fault_has_a_row(file: str) -> None:
    told = {row[3].strip("`").split("::")[1] for row in ROWS if row[3].startswith(f"`{file}")}
    assert cases_of(file) - NO_FAULTS == told
