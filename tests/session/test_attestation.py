"""The attested handshake."""

from tests.session.attestation_diagram import PAGE, drawn


def test_the_diagram_is_that_of_the_table() -> None:
    assert drawn(PAGE.read_text()) == PAGE.read_text()
