"""The documentation tells of everything that there is, and of nothing else."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from sealane.cli import app
from sealane.errors import CATALOGUE
from sealane.host.config import documented_keys
from sealane.host.models import VmDefinition
from tests.cli.conftest import Run
from tests.cli.generate_docs import DOCS, configuration_table, errors_page, families, with_generated
from tests.cli.log_events import logs_table, told_in

MAN = DOCS / "man" / "sealane.1"


def commands() -> dict[str, Any]:
    """Every command by its full name, groups left out; `demo` tells of itself."""
    root: Any = typer.main.get_command(app)
    found = {}
    with root.make_context("sealane", [], resilient_parsing=True) as context:
        for name in root.list_commands(context):
            command = root.get_command(context, name)
            for inner, leaf in getattr(command, "commands", {"": command}).items():
                found[f"{name} {inner}".strip()] = leaf
    return found


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts if option.startswith("--")}


def plain(text: str) -> str:
    return text.replace("\\-", "-").replace("\\&", "")


def sections() -> dict[str, str]:
    """The manual page's text on each command."""
    parts = re.split(r"^\.S[SH] ", plain(MAN.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {part.split("\n", 1)[0]: part for part in parts}


def section_of(name: str) -> str:
    for head, text in sections().items():
        if f"{head} ".startswith(f"sealane {name} "):
            return text
    raise AssertionError(f"docs/man/sealane.1 has no section on `sealane {name}`")


def test_every_error_code_is_documented_and_no_other() -> None:
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([a-z.-]+)` \|", page, flags=re.MULTILINE)) == set(CATALOGUE)
    assert page == errors_page(), "run: python -m tests.cli.generate_docs"


def test_every_exit_status_is_in_the_manual_page() -> None:
    text = sections()["EXIT STATUS"]
    told = {int(status) for status in re.findall(r"^\.B (\d+)$", text, flags=re.MULTILINE)}
    assert told == {0, 1, 130} | {family.exit_status for family in families()}


def test_every_setting_is_documented() -> None:
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    assert page == with_generated(page, configuration_table()), "run: python -m tests.cli.generate_docs"
    for key, _, description in documented_keys():
        assert f"| `{key}` |" in page
        assert description, f"{key} has no description"
    for field in VmDefinition.model_fields:
        assert f"`vm.{field}`" in page


def test_every_log_event_is_documented() -> None:
    page = (DOCS / "logs.md").read_text(encoding="utf-8")
    assert page == with_generated(page, logs_table(page)), "run: PYTHONPATH=. python -m tests.cli.generate_docs"
    unexplained = [event for event, words in told_in(page).items() if words == "?"]
    assert not unexplained, f"say in docs/logs.md when these are logged: {unexplained}"


def test_every_command_and_option_is_in_the_manual_page() -> None:
    shared = sections()["OPTIONS"]
    for name, command in commands().items():
        text = section_of(name)
        if name == "demo":
            continue
        for option in options_of(command) - {"--help"}:
            assert option in text or option in shared, f"{option} of `sealane {name}`"


def test_the_manual_page_tells_of_no_other_command_or_option() -> None:
    every = commands()
    shared = {"--json", "--quiet", "--verbose", "--help", "--install-completion", "--show-completion"}
    for head, text in sections().items():
        if not head.startswith("sealane ") or head == "sealane demo":
            continue
        words = head.split()[1:]
        name = next(" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in every)
        assert set(re.findall(r"(--[a-z][a-z-]+)", text)) <= options_of(every[name]) | shared


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not here")
def test_the_manual_page_has_no_warnings() -> None:
    told = subprocess.run(["groff", "-man", "-ww", "-Tutf8", str(MAN)], capture_output=True, text=True, check=True)
    assert told.stderr == ""
    assert "sealane migrate VM HOST" in re.sub(".\x08", "", told.stdout)  # bold is struck over


def test_every_help_teaches_with_an_example(run: Run) -> None:
    for name in commands():
        if name == "demo":
            continue
        told = run(*name.split(), "--help")
        assert told.exit_code == 0
        assert f"  sealane {name}" in told.stdout, name
        assert "\x1b" not in told.stdout


def test_links_between_pages_lead_somewhere() -> None:
    root = DOCS.parent
    for page in [root / "README.md", root / "CONTRIBUTING.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and target not in {"docs/adr/"}:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_examples_of_configuration_are_toml() -> None:
    for block in re.findall(
        r"```toml\n(.*?)```", (DOCS / "configuration.md").read_text(encoding="utf-8"), flags=re.DOTALL
    ):
        assert tomllib.loads(block)


def test_no_page_names_a_machine_of_ours() -> None:
    for page in [DOCS.parent / "README.md", *Path(DOCS).glob("*.md"), MAN]:
        assert not re.search(r"/(home|root|work|tmp)/", page.read_text(encoding="utf-8")), page
