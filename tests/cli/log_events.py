"""Every line that the code can log, found in its source: event, levels, and fields."""

import ast
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import sealane

SOURCE = Path(sealane.__file__).parent
LEVELS = ("debug", "info", "warning", "error", "exception")
# These speak to people on a terminal, or run inside tests.
LEFT_OUT = frozenset({"cli", "bench", "testing", "lab"})


@dataclass
class LogEvent:
    levels: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    where: set[str] = field(default_factory=set)


def log_events() -> dict[str, LogEvent]:
    """The events by their words. ValueError for a line whose words are not a literal: nobody could look it up."""
    found: dict[str, LogEvent] = defaultdict(LogEvent)
    for path in sorted(SOURCE.rglob("*.py")):
        if path.relative_to(SOURCE).parts[0] in LEFT_OUT:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not _is_logger(node.func):
                continue
            assert isinstance(node.func, ast.Attribute)
            first = node.args[0] if node.args else None
            if not isinstance(first, ast.Constant) or not isinstance(first.value, str):
                raise ValueError(f"{path}:{node.lineno}: the event of a log line has to be a literal")
            event = found[first.value]
            event.levels.add("error" if node.func.attr == "exception" else node.func.attr)
            event.where.add(str(path.relative_to(SOURCE)))
            event.fields |= {
                keyword.arg or "..." for keyword in node.keywords if keyword.arg not in {"exc_info", "migration"}
            }
    return dict(found)


def _is_logger(function: ast.expr) -> bool:
    if not isinstance(function, ast.Attribute) or function.attr not in LEVELS:
        return False
    value = function.value
    if isinstance(value, ast.Call):  # structlog.get_logger().error(…)
        value = value.func
        return isinstance(value, ast.Attribute) and value.attr in {"get_logger", "bind"}
    name = value.attr if isinstance(value, ast.Attribute) else value.id if isinstance(value, ast.Name) else ""
    return name.lstrip("_") == "log"


def told_in(page: str) -> dict[str, str]:
    """What the page says of each event: the last cell of its row."""
    rows = [line.strip("|").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    return {row[0].strip().strip("`"): row[-1].strip() for row in rows}


def logs_table(page: str) -> str:
    """The table of docs/logs.md: levels and fields from the source, the words from the page as it is."""
    told = told_in(page)
    lines = ["| event | level | fields | when |", "| --- | --- | --- | --- |"]
    for words, event in sorted(log_events().items()):
        levels = ", ".join(level for level in LEVELS if level in event.levels)
        fields = ", ".join(f"`{name}`" for name in sorted(event.fields)) or "-"
        lines.append(f"| `{words}` | {levels} | {fields} | {told.get(words, '?')} |")
    return "\n".join(lines)
