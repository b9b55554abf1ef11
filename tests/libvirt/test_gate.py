"""The client's last word at the source's libvirtd: what passes, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sealane.libvirt.gate import ConfirmGate, Word
from sealane.libvirt.rpc import Procedure
from tests.libvirt.rig import FLAGS, connect_open, domain, feature, message, opaque, parameters, word


def confirm(cancelled: int) -> bytes:
    body = domain() + parameters({"migrate_uri": "unix:///x"}) + opaque(b"") + word(FLAGS) + word(cancelled)
    return message(Procedure.DOMAIN_MIGRATE_CONFIRM3_PARAMS, body, serial=9)


def test_the_end_of_the_copy_waits_for_the_hand_over() -> None:
    gate = ConfirmGate()
    assert gate.feed(connect_open() + confirm(0)) == connect_open()
    assert gate.word is Word.DONE
    gate.is_released = True
    assert gate.let_go() == confirm(0)
    assert gate.let_go() == b""


def test_the_domain_may_run_again_until_it_was_given_up() -> None:
    gate = ConfirmGate()
    assert gate.feed(confirm(1)) == confirm(1)
    assert gate.word is Word.BACK
    gate = ConfirmGate(is_released=True)
    assert gate.feed(confirm(1)) == b""
    assert gate.let_go() == b""


def test_a_word_that_was_taken_back_is_not_let_go() -> None:
    gate = ConfirmGate()
    assert gate.feed(confirm(0)) == b""
    gate.is_released = True
    assert gate.feed(confirm(1)) == b""
    assert gate.let_go() == b""


@given(st.lists(st.integers(min_value=1, max_value=50), max_size=20))
def test_any_cut_gives_the_same(cuts: list[int]) -> None:
    whole, gate, out, start = connect_open() + feature() + confirm(0), ConfirmGate(), b"", 0
    for cut in [*cuts, len(whole)]:
        out += gate.feed(whole[start : start + cut])
        start += cut
    assert out == connect_open() + feature()
    assert gate.word is Word.DONE


@pytest.mark.parametrize(
    "procedure", [Procedure.DOMAIN_MIGRATE_BEGIN3_PARAMS, Procedure.DOMAIN_MIGRATE_PERFORM3_PARAMS]
)
def test_other_calls_pass_as_they_are(procedure: Procedure) -> None:
    assert ConfirmGate().feed(message(procedure, b"abcd")) == message(procedure, b"abcd")
