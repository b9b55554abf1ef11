"""What an error says is fit to be shown and kept, whoever's words it quotes."""

import pytest

from sealane.errors import ControlError, make_error, printable
from sealane.host.models import Problem
from sealane.host.problems import problem_of

HOSTILE = "\x1b]0;title\x07 \x1b[2J\u202egpj.exe \ud800 end"


@pytest.mark.parametrize("make", [make_error, ControlError])
def test_an_error_that_quotes_somebody_is_fit_for_terminal_and_journal(make: type[ControlError]) -> None:
    error = make("vm.qmp", f"QEMU says: {HOSTILE}\nand more")
    assert error.detail.isprintable()
    assert error.detail.startswith("QEMU says: ?]0;title? ?[2J?gpj.exe ? end and more")
    assert str(error).isprintable()
    problem = problem_of(error)
    assert Problem.model_validate_json(problem.model_dump_json()) == problem


def test_words_are_bounded_and_other_alphabets_stay() -> None:
    assert printable("Größe ☃ 漢字\t", 100) == "Größe ☃ 漢字?"
    assert printable("x" * 9, 4) == "xxxx"
