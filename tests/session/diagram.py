"""Draws the hand-over's table into `docs/handover.md`: `python -m tests.session.diagram`."""

from pathlib import Path
from typing import Final

from sealane.session.handover import ENDED, TRANSITIONS, Role, State

PAGE: Final = Path(__file__).parents[2] / "docs" / "handover.md"
BEGIN: Final = "<!-- made by tests/session/diagram.py: begin -->\n"
END: Final = "<!-- made by tests/session/diagram.py: end -->\n"


def draw() -> str:
    """For each role a mermaid state diagram and the table it is made of."""
    parts = []
    for role in Role:
        lines = [f"### {role.value.capitalize()}\n", "```mermaid", "stateDiagram-v2"]
        lines += [f'    state "{state}" as {_id(state)}' for state in TRANSITIONS[role]]
        lines += [f"    [*] --> {_id(State.PREPARING)}"]
        rows = ["| state | happened | then |", "| --- | --- | --- |"]
        for state, steps in TRANSITIONS[role].items():
            lines += [f"    {_id(state)} --> {_id(after)}: {happened}" for happened, after in steps.items()]
            lines += [f"    {_id(state)} --> [*]"] if state in ENDED else []
            rows += [f"| `{state}` | `{happened}` | `{after}` |" for happened, after in steps.items()]
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
