"""The question of a source in doubt: put to the host that the ticket was given to, and only its own answer taken."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from sealane.errors import SealaneError
from sealane.host.migration import messages
from sealane.host.migration.asking import _peer_of, _put
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.enclave_process import EnclaveProcess
from sealane.host.models import Peer
from tests.host.factories import migration

PEER, OTHER = "SHA256:" + "a" * 64, "SHA256:" + "b" * 64
DOUBT = migration(1, state="in-doubt", epoch=4, peer_fingerprint=PEER)
ABOUT: dict[str, Any] = {"migration": DOUBT.id, "vm": "web01", "epoch": 4}


def context(fingerprint: str, *, is_trusted: bool = True, address: str | None = "a") -> MigrationContext:
    peer = Peer(name="host-b", fingerprint=fingerprint, address=address)
    peers = SimpleNamespace(get=lambda _: peer, is_trusted=lambda _: is_trusted)
    return cast(MigrationContext, SimpleNamespace(peers=peers))


def enclave(said: messages.Message) -> EnclaveProcess:
    async def next_message(_limit: float, _what: str) -> messages.Message:
        return said

    return cast(EnclaveProcess, SimpleNamespace(call=lambda _: None, next_message=next_message))


def test_another_host_of_that_name_is_not_asked() -> None:
    assert _peer_of(context(PEER), DOUBT).fingerprint == PEER
    with pytest.raises(SealaneError, match=r"peer\.unknown"):
        _peer_of(context(OTHER), DOUBT)
    assert _peer_of(context(OTHER, is_trusted=False), DOUBT)  # its name is what its CA vouches for
    with pytest.raises(SealaneError, match=r"trust\.no-address"):
        _peer_of(context(PEER, address=None), DOUBT)


@pytest.mark.parametrize("kind", [messages.Ran, messages.Promise])
@pytest.mark.parametrize("other", [{}, {"epoch": 5}, {"vm": "web02"}, {"migration": f"{2:032x}"}])
async def test_an_answer_about_another_ticket_is_none(
    kind: type[messages.Ran | messages.Promise], other: dict[str, Any]
) -> None:
    said = kind(**{**ABOUT, **other})
    if not other:
        assert await _put(enclave(said), DOUBT) == said
        return
    with pytest.raises(SealaneError, match=r"peer\.message"):
        await _put(enclave(said), DOUBT)


async def test_a_refusal_is_no_answer() -> None:
    with pytest.raises(SealaneError, match=r"peer\.message"):
        await _put(enclave(messages.TicketRefused(code="x", detail="")), DOUBT)
