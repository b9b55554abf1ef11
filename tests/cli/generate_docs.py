"""Writes the parts of docs/ that are made of the code: `python -m tests.cli.generate_docs`. A test compares them."""

from pathlib import Path

from sealane.errors import CATALOGUE, SealaneError, family_of
from sealane.host.config import documented_keys
from sealane.host.metrics import METRICS
from tests.cli.log_events import logs_table

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"

_ERRORS_HEAD = """\
# Errors

Every failure has a stable code, which stands at the end of its first line, in `code` of a JSON error, and in `code` of an
answer of the agent (`application/problem+json`). Below are all of them: what each means, what usually mends it, and
whether trying again can help. This page is made from `src/sealane/error_codes.py`.

## Exit status

| status | meaning |
| --- | --- |
| 0 | done; for `migrate`: the VM runs at the destination (with `--detach`: the agent has begun) |
| 1 | the interpreter failed, or the output could not be written; for `attest verify`: the evidence is refused |
"""
_ERRORS_TAIL = """\
| 130 | Ctrl-C; for `migrate`: the second one, which leaves the migration to the agent |

`doctor` exits with 5 when something is broken, and with 0 when there are only warnings.
"""


def families() -> list[type[SealaneError]]:
    """The families in the order of the catalogue."""
    return list(dict.fromkeys(family_of(code) for code in CATALOGUE))


def errors_page() -> str:
    """docs/errors.md."""
    rows = [f"| {one.exit_status} | {_sentence(one)} (`{one.__name__}`) |" for one in families()]
    parts = [_ERRORS_HEAD + "\n".join(rows) + "\n" + _ERRORS_TAIL]
    for family in families():
        lines = [
            f"## {family.__name__}: exit status {family.exit_status}, HTTP {family.http_status}\n",
            _sentence(family) + ".\n",
            "| code | meaning | mend | again? |",
            "| --- | --- | --- | --- |",
        ]
        for code, entry in CATALOGUE.items():
            if family_of(code) is family:
                again = "yes" if entry.retryable else "no"
                lines.append(f"| `{code}` | {entry.summary} | {entry.mend} | {again} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def configuration_table() -> str:
    """The keys of agent.toml, for docs/configuration.md."""
    lines = ["| key | default | what it is |", "| --- | --- | --- |"]
    lines += [f"| `{key}` | {default} | {description} |" for key, default, description in documented_keys()]
    return "\n".join(lines)


def metrics_table() -> str:
    """The metrics, for docs/metrics.md."""
    lines = ["| metric | kind | labels | what it is |", "| --- | --- | --- | --- |"]
    lines += [f"| `{name}` | {one.kind} | {one.labels or '-'} | {one.words} |" for name, one in METRICS.items()]
    return "\n".join(lines)


def with_generated(page: str, generated: str) -> str:
    """The page with what stands between the two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{generated}\n{END}{after}"


def _sentence(family: type[SealaneError]) -> str:
    return (family.__doc__ or "").strip().split("\n")[0].rstrip(".")


def main() -> None:
    """Write the pages."""
    (DOCS / "errors.md").write_text(errors_page(), encoding="utf-8")
    for name, table in (("configuration.md", configuration_table()), ("metrics.md", metrics_table())):
        page = DOCS / name
        page.write_text(with_generated(page.read_text(encoding="utf-8"), table), encoding="utf-8")
    logs = DOCS / "logs.md"
    text = logs.read_text(encoding="utf-8")
    logs.write_text(with_generated(text, logs_table(text)), encoding="utf-8")


if __name__ == "__main__":
    main()
