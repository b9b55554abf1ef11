"""Draws the attested handshake's table into `docs/handshake.md`: `python -m tests.session.attestation_diagram`."""

from pathlib import Path
from typing import Final

from sealane.session.attestation import TRANSITIONS, State
from sealane.session.exchange import End

PAGE: Final = Path(__file__).parents[2] / "docs" / "handshake.md"
BEGIN: Final = "<!-- made by tests/session/attestation_diagram.py: begin -->\n"
END: Final = "<!-- made by tests/session/attestation_diagram.py: end -->\n"


def draw() -> str:
    """For each role a mermaid state diagram and the table it is made of."""
    parts = []
    for role in End:
        lines = [f"### {role.value.capitalize()}\n", "```mermaid", "stateDiagram-v2"]
        lines += [f'    state "{state}" as {_id(state)}' for state in TRANSITIONS[role]]
        lines += [f"    [*] --> {_id(State.CHALLENGED)}"]
        rows = ["| state | happened | then |", "| --- | --- | --- |"]
        for state, steps in TRANSITIONS[role].items():
            lines += [f"    {_id(state)} --> {_id(after)}: {happened}" for happened, after in steps.items()]
            rows += [f"| `{state}` | `{happened}` | `{after}` |" for happened, after in steps.items()]
        lines += [f"    {_id(State.ATTESTED)} --> [*]"]
        parts.append("\n".join([*lines, "```", "", *rows, ""]))
    return "\n" + "\n".join(parts) + "\n"


def _id(state: State) -> str:
    """Mermaid takes no hyphen in an identifier."""
    return state.replace("-", "_")


def drawn(page: str) -> str:
    """The page with its drawing made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + draw() + END + after


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text()))
