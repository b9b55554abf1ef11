"""Draws `models/table.pml` from the code's own tables: `python -m tests.models.table` after they changed."""

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from sealane.host.migration.messages import Message
from sealane.session.handover import TRANSITIONS, Input, Role, State

MODELS = Path(__file__).parent.parent.parent / "models"
TABLE = MODELS / "table.pml"
_HEAD = """\
/*
 * Drawn from sealane.session.handover and sealane.host.migration.messages by tests/models/table.py; do not edit.
 * ROLE_after(state, input) is the state that follows, or 0 where the code's table has no such step.
 */
"""


def kinds() -> list[str]:
    """The kinds of the agents' messages, in the order of the code."""
    return [each.model_fields["kind"].default for each in get_args(Message)]


def pml_name(text: str) -> str:
    """A name as Promela can have it."""
    return text.replace("-", "_")


def drawn() -> str:
    """The file's content."""
    return "\n".join(
        [
            _HEAD + _mtype("state", (state.name for state in State)),
            _mtype("input", (happened.name for happened in Input)),
            _mtype("message", map(pml_name, kinds())),
            *(_after(role) for role in Role),
            "",
        ]
    )


def _mtype(kind: str, names: Iterable[str]) -> str:
    return f"mtype:{kind} = {{ {', '.join(names)} }};"


def _after(role: Role) -> str:
    steps = [
        (state.name, happened.name, following.name)
        for state, row in TRANSITIONS[role].items()
        for happened, following in row.items()
    ]
    lines = [f"\t((state) == {state} && (input) == {happened} -> {after} : \\" for state, happened, after in steps]
    return "\n".join(["", f"#define {role}_after(state, input) \\", *lines, "\t0" + ")" * len(steps)])


if __name__ == "__main__":
    TABLE.write_text(drawn())
