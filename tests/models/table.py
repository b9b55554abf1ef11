"""Draws the models' tables from the code's own: `python -m tests.models.table` after they changed."""

from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args

from sealane.host.migration.messages import Message
from sealane.session import attestation
from sealane.session.exchange import End
from sealane.session.handover import TRANSITIONS, Input, Role, State

MODELS = Path(__file__).parent.parent.parent / "models"
TABLE = MODELS / "table.pml"
HANDSHAKE_TABLE = MODELS / "handshake_table.pml"
_HEAD = """\
/*
 * Drawn from {modules} by tests/models/table.py; do not edit.
 * ROLE_after(state, input) is the state that follows, or 0 where the code's table has no such step.
 */
"""
_Table = Mapping[Any, Mapping[Any, StrEnum]]


def kinds() -> list[str]:
    """The kinds of the agents' messages, in the order of the code."""
    return [each.model_fields["kind"].default for each in get_args(Message)]


def pml_name(text: str) -> str:
    """A name as Promela can have it."""
    return text.replace("-", "_")


def drawn() -> str:
    """The hand-over's table."""
    return "\n".join(
        [
            _HEAD.format(modules="sealane.session.handover and sealane.host.migration.messages")
            + _mtype("state", (state.name for state in State)),
            _mtype("input", (happened.name for happened in Input)),
            _mtype("message", map(pml_name, kinds())),
            *(_after(role, TRANSITIONS[role]) for role in Role),
            "",
        ]
    )


def drawn_handshake() -> str:
    """The attested handshake's table."""
    return "\n".join(
        [
            _HEAD.format(modules="sealane.session.attestation")
            + _mtype("end", (end.name for end in End))
            + "\n"
            + _mtype("state", (state.name for state in attestation.State)),
            _mtype("input", (happened.name for happened in attestation.Input)),
            *(_after(end, attestation.TRANSITIONS[end]) for end in End),
            "",
        ]
    )


DRAWN: Mapping[Path, Callable[[], str]] = {TABLE: drawn, HANDSHAKE_TABLE: drawn_handshake}


def _mtype(kind: str, names: Iterable[str]) -> str:
    return f"mtype:{kind} = {{ {', '.join(names)} }};"


def _after(role: StrEnum, table: _Table) -> str:
    steps = [
        (state.name, happened.name, following.name)
        for state, row in table.items()
        for happened, following in row.items()
    ]
    lines = [f"\t((state) == {state} && (input) == {happened} -> {after} : \\" for state, happened, after in steps]
    return "\n".join(["", f"#define {role}_after(state, input) \\", *lines, "\t0" + ")" * len(steps)])


if __name__ == "__main__":
    for path, draw in DRAWN.items():
        path.write_text(draw())
