"""`sealane evacuate` against a stand-in agent: who goes where, how each ends, what Ctrl-C and a lost agent do."""

import json
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from rich.console import Console

from sealane.cli.client import AgentClient, AgentGone
from sealane.cli.evacuate import Departure, Evacuation, plan
from sealane.cli.evacuation_screen import LiveScreen, Screen, table_of, totals
from sealane.cli.output import Output, Settings
from sealane.errors import SealaneError, make_error
from sealane.host.models import (
    Event,
    Migration,
    MigrationRequest,
    PeerTrust,
    PeerView,
    PolicyDecision,
    Problem,
    Progress,
    QueuePlace,
    Vm,
)
from sealane.host.problems import problem_of
from tests.cli.stand_in import FINGERPRINT, completed
from tests.host.factories import migration

GIB = 1 << 30
Step = Callable[[], Iterator[Event]]


def a_vm(name: str, state: str = "running", memory: int = GIB) -> Vm:
    return Vm.model_validate({"name": name, "qmp": f"/{name}", "state": state, "memory_bytes": memory})


class FakeAgent:
    """An agent whose migrations end as `fates` say, one after the other: an error's code, None for arrived."""

    def __init__(self, *vms: Vm, hosts: tuple[str, ...] = ("host-b", "host-c")) -> None:
        self.known = list(vms)
        self.names = hosts
        self.denied: dict[tuple[str, str], str] = {}
        self.without_address: set[str] = set()
        self.refusals: dict[str, SealaneError] = {}
        self.fates: dict[str, list[str | None]] = {}
        self.begun: dict[str, Migration] = {}
        self.requests: list[MigrationRequest] = []
        self.cancelled: list[str] = []
        self.before_stream: list[Callable[[], None]] = []

    def vms(self) -> list[Vm]:
        return self.known

    def hosts(self, vm: str | None = None) -> list[PeerView]:
        found = []
        for name in self.names:
            code = self.denied.get((vm or "", name))
            decision = PolicyDecision(
                decision="deny" if code else "allow", digest="0" * 64, source="default", words="as told", code=code
            )
            address = None if name in self.without_address else "::1"
            found.append(
                PeerView(name=name, fingerprint=FINGERPRINT, address=address, trust=PeerTrust(), decision=decision)
            )
        return found

    def start_migration(self, request: MigrationRequest) -> Migration:
        self.requests.append(request)
        if request.vm in self.refusals:
            raise self.refusals[request.vm]
        number = len(self.requests)
        made = migration(number, vm=request.vm, peer=request.host, state="copying", group=request.group)
        self.begun[made.id] = made
        return made

    def group_events(self, group: str) -> Iterator[Event]:
        if self.before_stream:
            self.before_stream.pop(0)()
        for id, one in list(self.begun.items()):
            if one.state not in {"completed", "aborted", "in-doubt"}:
                self.begun[id] = self._ended(one)
                yield Event(type="end", migration=self.begun[id])

    def _ended(self, one: Migration) -> Migration:
        fates = self.fates.get(one.vm, [])
        code = fates.pop(0) if fates else None
        if code is None:
            return one.model_copy(update={"state": "completed", "runs_at": "destination"})
        problem: Problem = problem_of(make_error(code))
        state = "in-doubt" if code == "handover.in-doubt" else "aborted"
        runs_at = "in-doubt" if code == "handover.in-doubt" else "source"
        return one.model_copy(update={"state": state, "runs_at": runs_at, "problem": problem})

    def migrations(self) -> list[Migration]:
        return list(self.begun.values())

    def migration(self, id: str) -> Migration:
        return self.begun[id]

    def cancel(self, id: str) -> None:
        self.cancelled.append(self.begun[id].vm)
        self.fates[self.begun[id].vm] = ["migration.cancelled"]


def as_client(agent: FakeAgent) -> AgentClient:
    return cast(AgentClient, agent)


class Run:
    """An evacuation, its status and its JSON lines."""

    def __init__(
        self, agent: FakeAgent, capsys: pytest.CaptureFixture[str], hosts: tuple[str, ...] = ("host-b",)
    ) -> None:
        out = Output(Settings(as_json=True))
        departures = plan(as_client(agent), hosts, None)
        self.status = Evacuation(as_client(agent), departures, Screen(out), out, pause_s=0.0).run()
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        self.summary = next(line for line in self.lines if line["type"] == "summary")

    def outcomes(self) -> dict[str, tuple[str, str | None]]:
        return {each["vm"]: (each["outcome"], each["code"]) for each in self.summary["vms"]}


def test_each_goes_where_policy_lets_it_and_memory_is_shared_out() -> None:
    agent = FakeAgent(
        a_vm("a", memory=3 * GIB), a_vm("b"), a_vm("c"), a_vm("d"), a_vm("e", "paused"), a_vm("f", "absent")
    )
    agent.denied = {
        ("b", "host-c"): "policy.denied",
        ("d", "host-b"): "policy.denied",
        ("d", "host-c"): "policy.denied",
    }
    found = {each.vm.name: each.host or each.code for each in plan(as_client(agent), ["host-b", "host-c"], None)}
    # b must go to host-b whatever it has been given
    assert found == {"a": "host-b", "b": "host-b", "c": "host-c", "d": "policy.denied", "e": "vm.not-running"}
    assert [each.vm.name for each in plan(as_client(agent), ["host-b"], ["c", "a", "c"])] == ["c", "a"]
    agent.without_address = {"host-b"}
    assert plan(as_client(agent), ["host-b"], ["a"])[0].code == "trust.no-address"
    for hosts, names, code in ((["host-z"], None, "trust.unknown"), (["host-b"], ["z"], "vm.unknown")):
        with pytest.raises(SealaneError, match=code.replace(".", r"\.")):
            plan(as_client(agent), hosts, names)


def test_all_arrive(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(FakeAgent(a_vm("a"), a_vm("b")), capsys)
    assert (run.status, run.summary["arrived"]) == (0, 2)
    assert run.outcomes() == {"a": ("arrived", None), "b": ("arrived", None)}


def test_nothing_to_move(capsys: pytest.CaptureFixture[str]) -> None:
    assert Run(FakeAgent(a_vm("a", "absent")), capsys).status == 0


def test_what_cannot_go_says_why_and_the_others_go(capsys: pytest.CaptureFixture[str]) -> None:
    agent = FakeAgent(a_vm("a"), a_vm("b"), a_vm("c"), a_vm("d"))
    agent.fates = {"b": ["check.memory"]}
    agent.refusals = {"c": make_error("vm.busy")}
    agent.denied = {("d", "host-b"): "policy.level-too-low"}
    run = Run(agent, capsys)
    assert run.status == 6
    assert run.outcomes() == {
        "a": ("arrived", None),
        "b": ("stayed", "check.memory"),
        "c": ("stayed", "vm.busy"),
        "d": ("stayed", "policy.level-too-low"),
    }
    assert run.lines[-1]["code"] == "evacuation.incomplete"


def test_doubt_is_told_above_all(capsys: pytest.CaptureFixture[str]) -> None:
    agent = FakeAgent(a_vm("a"), a_vm("b"))
    agent.fates = {"a": ["handover.in-doubt"], "b": ["check.memory"]}
    run = Run(agent, capsys)
    assert run.status == 7
    assert run.summary["in-doubt"] == 1


def test_what_passes_is_asked_for_again_and_not_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    agent = FakeAgent(a_vm("a"), a_vm("b"), a_vm("c"))
    agent.fates = {"a": ["peer.busy", "agent.stopping"], "b": ["peer.busy"] * 20, "c": ["lane.integrity"]}
    run = Run(agent, capsys)
    assert run.outcomes() == {"a": ("arrived", None), "b": ("stayed", "peer.busy"), "c": ("stayed", "lane.integrity")}
    asked = [request.vm for request in agent.requests]
    assert (asked.count("a"), asked.count("b"), asked.count("c")) == (3, 5, 1)


def interrupt() -> None:
    raise KeyboardInterrupt


def go_away() -> None:
    raise AgentGone("agent.unreachable", "gone")


def test_ctrl_c_cancels_what_waits_then_what_moves(capsys: pytest.CaptureFixture[str]) -> None:
    agent = FakeAgent(a_vm("a"), a_vm("b"))

    def queue_b_and_interrupt() -> None:
        for id, one in agent.begun.items():
            if one.vm == "b":
                agent.begun[id] = one.model_copy(update={"state": "queued"})
        interrupt()

    agent.before_stream = [queue_b_and_interrupt]
    run = Run(agent, capsys)
    assert agent.cancelled == ["b"]
    assert run.outcomes() == {"a": ("arrived", None), "b": ("stayed", "migration.cancelled")}
    agent = FakeAgent(a_vm("a"), a_vm("b"))
    agent.before_stream = [interrupt, interrupt]
    run = Run(agent, capsys)
    assert (run.status, sorted(agent.cancelled)) == (6, ["a", "b"])


def test_a_third_ctrl_c_leaves_it_to_the_agent(capsys: pytest.CaptureFixture[str]) -> None:
    agent = FakeAgent(a_vm("a"))
    agent.before_stream = [interrupt, interrupt, interrupt]
    run = Run(agent, capsys)
    assert (run.status, run.outcomes()) == (130, {"a": ("going", None)})


def test_an_agent_that_was_away_is_followed_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sealane.cli.evacuate.REATTACH_PAUSE_S", 0.0)
    agent = FakeAgent(a_vm("a"), a_vm("b"))
    agent.before_stream = [go_away]
    assert Run(agent, capsys).status == 0
    agent = FakeAgent(a_vm("a"))
    agent.before_stream = [go_away]
    monkeypatch.setattr(agent, "migration", lambda id: go_away())
    run = Run(agent, capsys)
    assert run.outcomes() == {"a": ("unknown", "agent.unreachable")}
    assert run.status == 6


def departures() -> list[Departure]:
    place = QueuePlace(place=1, waiting=1, why="its limit")
    progress = Progress(bytes_total=100, bytes_remaining=40, bytes_transferred=60, bytes_wire=60, rate_bytes_per_s=5e6)
    arrived = completed().migration
    return [
        Departure(a_vm("done"), "host-b", arrived.model_copy(update={"vm": "done"})),
        Departure(a_vm("going"), "host-b", migration(2, state="copying", progress=progress)),
        Departure(a_vm("waits"), "host-b", migration(3, state="queued", queue=place, detail="place 1 of 1")),
        Departure(a_vm("denied"), None, error=make_error("policy.denied", "\x1b[31mno")),
    ]


def test_the_view_has_all_and_fits_the_terminal() -> None:
    console = Console(width=100, height=30, record=True, force_terminal=False)
    console.print(table_of(departures(), width=100, height=30))
    text = console.export_text()
    assert [line.split()[0] for line in text.splitlines()] == ["going", "waits", "denied", "done", "1"]
    assert "\x1b" not in text
    long = [*departures(), Departure(a_vm("long"), "host-b", error=make_error("policy.denied", "words " * 40))]
    console = Console(width=100, height=30, record=True)
    console.print(table_of(long, width=100, height=30))
    text = console.export_text()
    assert "→ host-b  copying" in text
    assert "…" in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert totals(departures()).startswith("1 of 4 arrived · 1 move · 1 wait · 1 stay here")
    many = [Departure(a_vm(f"vm{number:03}"), "host-b") for number in range(300)]
    console = Console(width=100, height=30, record=True)
    console.print(table_of(many, width=100, height=30))
    assert len(console.export_text().splitlines()) <= 30
    live = LiveScreen(Output(Settings()), console=Console(quiet=True))
    live.show(many)
    live.stop()
