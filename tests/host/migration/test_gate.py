"""The policy during the copy: asked with each later verdict, and a no that is still to come holds the hand-over back."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sealane.enclave.interface import PeerSeen
from sealane.errors import SealaneError, make_error
from sealane.host.migration import gate as gate_module
from sealane.host.migration.gate import StandingGate

VERDICT = {"level": 3, "production_level": 1, "evidence": [], "reasons": []}


def seen(*, accepted: bool = True) -> PeerSeen:
    words = json.dumps(VERDICT)
    return PeerSeen("host-b", "ab" * 32, "TLSv1.3", "X25519", "AES", "web01", 7, words, "sealed", "", accepted)


class World:
    """Job and enclave as the gate uses them, and a policy that answers when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.updates: list[dict[str, Any]] = []
        self.failed: list[SealaneError] = []
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.levels: list[int] = []
        self.enclave = SimpleNamespace(on_peer_seen=None, fail=self.failed.append)
        job = SimpleNamespace(id="0123456789", update=lambda **facts: self.updates.append(facts))
        monkeypatch.setattr(gate_module, "_ask", self._ask)
        monkeypatch.setattr(gate_module, "note_sighting", lambda *_: None)
        self.gate = StandingGate(*cast(Any, (job, None, self.enclave, None, "send")))

    async def _ask(self, _job: object, _context: object, _met: object, trust: Any, *_: object) -> None:
        self.levels.append(trust.level)
        await asyncio.shield(self.answer)

    def attested_again(self, *, accepted: bool = True) -> None:
        cast(Any, self.enclave.on_peer_seen)(seen(accepted=accepted))


async def test_nothing_was_seen_and_nothing_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    await world.gate.settled()
    assert (world.levels, world.failed, world.updates) == ([], [], [])


async def test_an_answer_that_is_to_come_holds_the_hand_over_back(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.attested_again()
    waiting = asyncio.create_task(world.gate.settled())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    assert world.levels == [3]
    world.answer.set_result(None)
    await waiting
    assert world.failed == []
    assert world.updates[0]["peer_trust"].level == 3


@pytest.mark.parametrize(
    ("error", "code"),
    [(make_error("policy.denied"), "policy.denied"), (RuntimeError("a fault of our own"), "internal.error")],
)
async def test_a_no_ends_the_migration_and_is_never_forgotten(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    world = World(monkeypatch)
    world.attested_again()
    world.answer.set_exception(error)
    for _ in range(2):
        with pytest.raises(SealaneError) as raised:
            await world.gate.settled()
        assert raised.value.code == code
    assert [each.code for each in world.failed] == [code]


async def test_a_refused_verdict_is_noted_and_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch)
    world.attested_again(accepted=False)
    await world.gate.settled()
    assert world.levels == []
    assert world.updates[0]["peer_trust"].level == 3


async def test_a_peer_that_begins_round_after_round_is_asked_about_one_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch)
    for _ in range(100):
        world.attested_again()
        await asyncio.sleep(0)
    assert world.levels == [3]
    waiting = asyncio.create_task(world.gate.settled())
    await asyncio.sleep(0)
    world.answer.set_result(None)
    await waiting
    assert world.levels == [3, 3], "the newest was asked about too"
    world.attested_again()
    await world.gate.settled()
    assert world.levels == [3, 3, 3]
