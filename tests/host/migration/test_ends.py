"""How a source takes its VM back, and what a reception refuses at once; QEMU and the enclave are played by the test."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sealane.enclave.interface import LaneTokens, PeerEstablished
from sealane.errors import SealaneError, for_peer, make_error, printable
from sealane.host.config import Settings
from sealane.host.migration import messages
from sealane.host.migration import reception as reception_module
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.reception import Reception
from sealane.host.migration.source import SourceMigration
from sealane.host.models import MigrationRequest, Peer, VmDefinition
from sealane.host.store import Store
from sealane.limits import PREPARE_TIMEOUT_S, TAKE_BACK_TRIES
from sealane.session.handover import State
from tests.host.factories import migration

DIGEST = "0" * 64
VERDICT = '{"level": 1, "production_level": 1, "root": "", "evidence": [], "reasons": [], "identities": []}'
TICKET = messages.Ticket(vm="web01", epoch=1, digest=DIGEST, vtpm=None)


class Qemu:
    """Answers `run_state` with what is left of `states`; an error among them is raised."""

    def __init__(self, *states: str | SealaneError) -> None:
        self.states, self.done = list(states), list[str]()
        self.is_closed = False

    async def __aenter__(self) -> "Qemu":
        if isinstance(self.states[0], SealaneError) and self.states[0].detail.startswith("connect"):
            raise self.states[0]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self.is_closed = True

    async def cancel_migration(self) -> None:
        self.done.append("cancel")

    async def resume(self) -> None:
        self.done.append("resume")

    async def run_state(self) -> str:
        state = self.states.pop(0)
        if isinstance(state, SealaneError):
            raise state
        return state


def hangs() -> SealaneError:
    return make_error("vm.unreachable", "no answer")


def is_gone() -> SealaneError:
    error = make_error("vm.unreachable", "connect: no such file")
    error.__cause__ = FileNotFoundError()
    return error


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "db") as opened:
        yield opened


@pytest.fixture
def a_source(store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., SourceMigration]:
    """A source in the given state whose QEMU answers so, and so once more for each new connection."""

    def make(state: State, first: Qemu, *later: Qemu) -> SourceMigration:
        context = cast(MigrationContext, SimpleNamespace(store=store, settings=Settings(name="a")))
        vm, peer = VmDefinition(name="web01", qmp="/q"), Peer(name="b", fingerprint="SHA256:" + "a" * 64)
        request = MigrationRequest(vm="web01", host="b")
        job = SourceMigration(context, request, vm, peer, migration(1, state=state.value))
        job._handover.state = state
        job._qemu, job._ran_before = cast(Any, first), True
        waiting = list(later)
        monkeypatch.setattr("sealane.host.migration.source.QmpMachine.connect", lambda *_: waiting.pop(0))
        return job

    return make


async def test_a_vm_is_taken_back_over_a_new_connection(a_source: Callable[..., SourceMigration]) -> None:
    first, second = Qemu(hangs()), Qemu("postmigrate", "running")
    job = a_source(State.SWITCHING_OVER, first, second)
    await job._give_up(make_error("peer.closed"))
    assert first.is_closed  # QMP serves one client at a time
    assert second.done == ["cancel", "resume"]
    assert (job.migration.state, job.migration.runs_at) == ("aborted", "source")
    assert job.migration.ended_at


async def test_a_qemu_that_does_not_answer_is_left_to_recovery_and_this_is_said(
    a_source: Callable[..., SourceMigration], store: Store
) -> None:
    job = a_source(State.SWITCHING_OVER, *(Qemu(hangs()) for _ in range(TAKE_BACK_TRIES)))
    await job._give_up(make_error("peer.closed"))
    assert (job.migration.state, job.migration.runs_at, job.migration.ended_at) == ("aborted", "nowhere", None)
    assert "may be paused here" in job.migration.detail
    assert job.migration.problem
    assert job.migration.problem.code == "peer.closed"
    assert [entry.migration for entry in store.unfinished()] == [job.migration]


async def test_a_qemu_that_is_gone_is_not_waited_for(a_source: Callable[..., SourceMigration]) -> None:
    job = a_source(State.COPYING, Qemu(hangs()), Qemu(is_gone()))
    await job._give_up(make_error("peer.closed"))
    assert (job.migration.state, job.migration.runs_at) == ("aborted", "nowhere")
    assert job.migration.ended_at


async def test_a_ticket_that_never_left_brings_the_vm_back(
    a_source: Callable[..., SourceMigration], store: Store
) -> None:
    qemu = Qemu("postmigrate", "running")
    job = a_source(State.HANDING_OVER, qemu)
    journalled: list[tuple[str, str]] = []

    class Dead:
        def call(self, *_: object) -> None:
            raise make_error("enclave.died")

    with pytest.raises(SealaneError) as raised:
        job._send_ticket(cast(Any, Dead()), TICKET)
    resume = qemu.resume

    async def look_first() -> None:
        entry = store.unfinished()[0].migration
        journalled.append((entry.state, entry.runs_at))
        await resume()

    qemu.resume = look_first  # type: ignore[method-assign]
    await job._give_up(raised.value)
    assert (job.migration.state, job.migration.runs_at) == ("aborted", "source")
    assert journalled == [
        ("aborted", "nowhere")
    ]  # before it runs again, the journal does not say any more that it was given up


async def test_a_ticket_that_left_does_not(a_source: Callable[..., SourceMigration]) -> None:
    qemu = Qemu("postmigrate", "running")
    job = a_source(State.HANDING_OVER, qemu)
    job._send_ticket(cast(Any, SimpleNamespace(call=lambda *_: None)), TICKET)
    await job._give_up(make_error("peer.closed"))
    assert (job.migration.state, job.migration.runs_at, qemu.done) == ("in-doubt", "in-doubt", [])


# ---- receptions


class Refusals:
    """Takes refusals, and keeps none."""

    def refuse(self, *_: object, **__: object) -> None:
        pass


def a_reception(store: Store) -> Reception:
    registry = SimpleNamespace(get=lambda name: VmDefinition(name=name, qmp="/q", launch_incoming=["qemu"]))
    return Reception(
        cast(
            MigrationContext, SimpleNamespace(store=store, registry=registry, jobs=SimpleNamespace(refusals=Refusals()))
        ),
        "1" * 32,
    )


def a_prepare(epoch: int) -> messages.Prepare:
    return messages.Prepare(
        vm="web01", uuid="u", qemu_version=(10, 0, 0), machine_type="q35", memory_bytes=1, cpus=1, capabilities=[],
        multifd_channels=0, epoch=epoch, vtpm=None, domain=None, postcopy=False,
    )  # fmt: skip


def test_an_epoch_that_was_here_already_is_refused_before_anything_is_launched(store: Store) -> None:
    store.journal(migration(1, state="completed"), epoch=5)
    met = PeerEstablished("b", "SHA256:" + "a" * 64, "TLSv1.3", "group", "cipher", "web01", 4, VERDICT)
    with pytest.raises(SealaneError, match=r"epoch 5, and 5 was here already \[handover\.refused\]"):
        a_reception(store)._begin_job(cast(Any, None), met, a_prepare(4))
    with pytest.raises(AttributeError):  # comes as far as the jobs, which the test does not have
        a_reception(store)._begin_job(cast(Any, None), replace(met, epoch=5), a_prepare(5))


@pytest.mark.parametrize("uris", [(), ("qemu:///system",)])
def test_a_domain_of_a_libvirtd_that_this_host_does_not_look_at_is_refused(uris: tuple[str, ...]) -> None:
    settings = Settings.model_validate({"name": "b", "libvirt": uris})
    context = cast(MigrationContext, SimpleNamespace(settings=settings))
    wish = messages.DomainWish(uri="qemu:///session", least_level=0, labels={})
    asked = a_prepare(0).model_copy(update={"domain": wish, "uuid": "ae3368f7-57e0-5307-be70-1afb23fe0461"})
    with pytest.raises(SealaneError, match="b takes no domains of qemu:///session") as raised:
        reception_module.incoming_domain(asked, context)
    assert raised.value.code == "check.vm-unknown"


async def test_a_proven_peer_says_soon_what_it_wants(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    class Enclave:
        async def next_message(self, timeout_s: float, _what: str) -> None:
            limits.append(timeout_s)
            raise make_error("peer.slow")

    async def start() -> Any:
        return Enclave()

    async def nothing(*_: object) -> Any:
        return PeerEstablished("b", "SHA256:" + "a" * 64, "TLSv1.3", "group", "cipher", "web01", 4, VERDICT)

    reception = a_reception(store)
    reception._context.launcher = cast(Any, SimpleNamespace(start_enclave=start))
    monkeypatch.setattr(reception, "_handshake", nothing)
    monkeypatch.setattr(reception_module, "_turn_away", nothing)
    with pytest.raises(SealaneError, match=r"peer\.slow"):
        await reception.meet(cast(Any, None))
    assert limits == [PREPARE_TIMEOUT_S] == [10.0]


async def test_a_vm_that_just_came_or_left_may_come_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last migration's job may clear up still: it is waited for before the next one's is made."""
    done: list[str] = []
    met = PeerEstablished("b", "SHA256:" + "a" * 64, "TLSv1.3", "group", "cipher", "web01", 4, VERDICT)

    async def next_message(*_: object) -> messages.Prepare:
        return a_prepare(4)

    async def let_go(vm: str) -> None:
        done.append(f"waited for {vm}")

    reception = a_reception(store)
    cast(Any, reception._context.jobs).let_go = let_go
    monkeypatch.setattr(reception, "_begin_job", lambda *_: done.append("began"))
    await reception._asked(cast(Any, SimpleNamespace(next_message=next_message)), met)
    assert done == ["waited for web01", "began"]


def test_a_lane_is_let_in_by_its_token_once(store: Store) -> None:
    """Neither the migration's id, nor the token of another lane, nor one that was used opens anything."""
    let_in: list[int] = []
    reception = a_reception(store)
    reception._enclave = cast(Any, SimpleNamespace(call=lambda call, _connection: let_in.append(call.lane)))
    connection = cast(Any, None)
    tokens = {lane: bytes([lane + 1]) * 16 for lane in (0, 1)}
    assert not reception.accept_lane(tokens[0], 0, connection)  # none is awaited yet
    reception.expect_lanes(LaneTokens({token.hex(): str(lane) for lane, token in tokens.items()}))
    for token, lane in ((bytes.fromhex("1" * 32), 0), (bytes(16), 0), (tokens[1], 0), (tokens[0], 1), (b"", 0)):
        assert not reception.accept_lane(token, lane, connection)
    assert reception.accept_lane(tokens[1], 1, connection)
    assert not reception.accept_lane(tokens[1], 1, connection)
    assert reception.accept_lane(tokens[0], 0, connection)
    assert let_in == [1, 0]


# ---- words


def test_a_peer_hears_nothing_of_this_hosts_paths_and_logs() -> None:
    told = for_peer(make_error("launch.failed", "/etc/secret: qemu: -drive password=x"))
    assert told.code == "launch.failed"
    assert told.detail == "the destination's QEMU did not start; more stands in `sealane status` there"
    said = make_error("check.cpus", "the number of CPUs is 2 at the source and 1 at the destination")
    assert for_peer(said) is said


def test_a_peers_words_are_made_fit_for_a_terminal() -> None:
    assert printable("a\x1b[31mb\nc\u202ed", 9) == "a?[31mb?c"


@pytest.mark.parametrize("field", ["uuid", "machine_type"])
def test_words_in_a_message_are_printable(field: str) -> None:
    with pytest.raises(SealaneError, match=r"peer\.message"):
        messages.parse_message(a_prepare(1).model_copy(update={field: "a\x1b[2J"}).model_dump_json())


def test_what_is_said_of_a_message_that_does_not_fit_is_printable_and_short() -> None:
    for bad in ('{"kind": "\\u001b[2J"}', '{"kind": "prepared", "\\u001b[2J' + "x" * 5000 + '": 1}'):
        with pytest.raises(SealaneError) as raised:
            messages.parse_message(bad)
        assert raised.value.detail.isprintable()
        assert len(raised.value.detail) <= 200
