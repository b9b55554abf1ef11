"""The REST interface: what it answers, and that every error has one shape."""

import asyncio
import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from sealane.crypto.identity import create_identity, save_identity
from sealane.host.agent import Agent
from sealane.host.api import create_app
from sealane.host.config import Settings
from sealane.host.models import Event, Host, Migration, Problem
from sealane.host.recovery import Recovery
from sealane.host.skew import AGENT_IS_OLDER, CALLER_IS_OLDER, VERSION_HEADER, own_version
from sealane.paths import Paths
from tests.host.factories import migration
from tests.host.stand_ins import StandInJob, StandInListener, make_source

FINGERPRINT = "SHA256:" + "a" * 64
# What never comes is found out; a starved machine is given its time.
PATIENCE_S = 90


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(tmp_path / "state", tmp_path / "run", tmp_path / "etc")
    for directory in (paths.state, paths.run, paths.config):
        directory.mkdir(mode=0o700)
    save_identity(paths, create_identity("host-a", now=datetime.now(UTC)))
    return paths


@pytest.fixture
async def agent(paths: Paths) -> AsyncIterator[Agent]:
    agent = Agent(paths, Settings(name="host-a"), make_listener=StandInListener, make_source=make_source)
    yield agent
    await agent.jobs.stop(0)
    agent.store.close()


@pytest.fixture
async def client(agent: Agent) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(agent), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://sealane") as client:
        yield client


def problem(answer: httpx.Response, code: str, status: int) -> Problem:
    assert answer.headers["content-type"] == "application/problem+json"
    told = Problem.model_validate_json(answer.content)
    assert (told.code, told.status, answer.status_code) == (code, status, status)
    assert told.title
    assert told.detail
    return told


async def prepare(client: httpx.AsyncClient, tmp_path: Path) -> None:
    vm = {"name": "web01", "qmp": str(tmp_path / "q")}
    peer = {"name": "host-b", "fingerprint": FINGERPRINT, "address": "::1"}
    assert (await client.post("/v1/vms", json=vm)).status_code == 201
    assert (await client.post("/v1/peers", json=peer)).status_code == 201


async def test_host_vms_and_peers(client: httpx.AsyncClient, agent: Agent, tmp_path: Path) -> None:
    host = Host.model_validate_json((await client.get("/v1/host")).content)
    assert (host.name, host.fingerprint, host.listen) == ("host-a", agent.identity.fingerprint, "[::1]:48217")
    await prepare(client, tmp_path)
    (tmp_path / "etc" / "vms.toml").write_text('[[vm]]\nname = "db02"\nqmp = "/nowhere"\n')
    vms = (await client.get("/v1/vms")).json()
    assert [(vm["name"], vm["source"], vm["state"]) for vm in vms] == [
        ("db02", "file", "absent"),
        ("web01", "registered", "absent"),
    ]
    problem(await client.post("/v1/vms", json={"name": "web01", "qmp": "/x"}), "vm.exists", 409)
    problem(await client.delete("/v1/vms/db02"), "usage.argument", 400)
    assert (await client.delete("/v1/vms/web01")).status_code == 204
    problem(await client.get("/v1/vms/web01"), "vm.unknown", 404)
    again = {"name": "host-b", "fingerprint": FINGERPRINT, "port": 7}
    assert (await client.post("/v1/peers", json=again)).json() == {**again, "address": "::1"}
    problem(await client.post("/v1/peers", json={**again, "fingerprint": "SHA256:" + "b" * 64}), "trust.exists", 409)
    problem(await client.post("/v1/peers", json={**again, "name": "c"}), "trust.exists", 409)
    assert (await client.delete("/v1/peers/host-b")).status_code == 204
    problem(await client.delete("/v1/peers/host-b"), "trust.unknown", 404)


async def test_a_migration_from_request_to_end(client: httpx.AsyncClient, agent: Agent, tmp_path: Path) -> None:
    await prepare(client, tmp_path)
    answer = await client.post("/v1/migrations", json={"vm": "web01", "host": "host-b"})
    assert answer.status_code == 202
    migration = Migration.model_validate_json(answer.content)
    problem(await client.post("/v1/migrations", json={"vm": "web01", "host": "host-b"}), "vm.busy", 409)
    problem(await client.delete("/v1/vms/web01"), "vm.busy", 409)
    shown = (await client.get("/v1/vms/web01")).json()
    assert (shown["state"], shown["migration"]) == ("running", migration.id)
    job = cast(StandInJob, agent.jobs.job(migration.id))
    job.steps.put_nowait(lambda: job.update(state="copying"))
    job.steps.put_nowait(lambda: job.end(state="completed", runs_at="destination"))
    job.steps.put_nowait(None)
    lines = (await client.get("/v1/migrations/1/events")).text.splitlines()
    events = [Event.model_validate_json(line) for line in lines]
    assert [(e.type, e.migration.state) for e in events][-1] == ("end", "completed")
    assert (await client.get(f"/v1/migrations/{migration.id}")).json()["state"] == "completed"
    assert (await client.get("/v1/migrations", params={"active": True})).json() == []
    assert len((await client.get("/v1/migrations", params={"vm": "web01"})).json()) == 1
    problem(await client.post("/v1/migrations/1/cancel"), "migration.over", 409)


async def test_a_migration_may_be_asked_for_as_soon_as_the_last_ones_end_is_told(
    client: httpx.AsyncClient, agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one's job still clears up then, and does so here until somebody waits for it."""
    await prepare(client, tmp_path)
    wish = {"vm": "web01", "host": "host-b"}
    first = Migration.model_validate_json((await client.post("/v1/migrations", json=wish)).content)
    job = cast(StandInJob, agent.jobs.job(first.id))
    job.steps.put_nowait(lambda: job.end(state="aborted", runs_at="source"))
    await asyncio.wait_for(job.ended.wait(), PATIENCE_S)
    wait = agent.jobs.let_go

    async def let_go(vm: str) -> None:
        job.steps.put_nowait(None)
        await wait(vm)

    monkeypatch.setattr(agent.jobs, "let_go", let_go)
    answer = await client.post("/v1/migrations", json=wish)
    assert answer.status_code == 202, answer.text
    assert agent.jobs.job(first.id) is None
    assert Migration.model_validate_json(answer.content).id != first.id


async def test_every_endpoint_has_one_shape_of_error(client: httpx.AsyncClient) -> None:
    schema: dict[str, Any] = (await client.get("/openapi.json")).json()
    assert schema["info"]["title"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], path
            assert operation["description"], path
            assert "application/problem+json" in operation["responses"]["default"]["content"]
            where = re.sub(r"\{\w+\}", "nobody", path)
            if "{" in path:
                wish = {"decision": "ask"} if path.endswith("/resolve") else None
                answer = await client.request(method, where, json=wish)
                assert Problem.model_validate_json(answer.content).status == 404
            if "requestBody" in operation:
                for body in (b"", b"{", b"[]", b'{"name": "-", "surplus": 1}'):
                    problem(await client.request(method, where, content=body), "usage.argument", 400)
        problem(await client.patch(re.sub(r"\{\w+\}", "nobody", path)), "usage.argument", 405)
    problem(await client.get("/v1/migrations?active=perhaps"), "usage.argument", 400)
    for nowhere in ("/", "/docs", "/redoc", "/v1", "/v2/host"):
        problem(await client.get(nowhere), "usage.argument", 404)


async def test_a_caller_of_another_version_is_told_so(client: httpx.AsyncClient) -> None:
    """What a newer command line asks for is never passed over, and what an older one leaves out not guessed."""
    client.headers[VERSION_HEADER] = "7.0.0"
    move = {"vm": "web01", "host": "host-b"}
    for unknown in (
        await client.post("/v1/migrations", json={**move, "by_night": True}),
        await client.get("/v1/migrations", params={"by_night": "true"}),
        await client.post("/v1/by-night", json={}),
        await client.put("/v1/host"),
    ):
        told = problem(unknown, "agent.version", 409)
        assert "Sealane 7.0.0" in told.detail
        assert f"this agent {own_version()}" in told.detail
        assert told.mend == AGENT_IS_OLDER
        assert unknown.headers[VERSION_HEADER] == own_version()
    told = problem(await client.post("/v1/migrations", json={"vm": "web01"}), "agent.version", 409)
    assert "host: Field required" in told.detail
    assert told.mend == CALLER_IS_OLDER


async def test_the_total_rate_is_changed_live(client: httpx.AsyncClient, agent: Agent) -> None:
    assert (await client.get("/v1/rate")).json() == {"max_bytes_per_s": 0}
    assert (await client.put("/v1/rate", json={"max_bytes_per_s": 9})).json() == {"max_bytes_per_s": 9}
    assert agent.rates.total_bytes_per_s == 9
    for bad in (-1, 2**63, None, "9 apples"):
        problem(await client.put("/v1/rate", json={"max_bytes_per_s": bad}), "usage.argument", 400)


async def test_no_caller_has_an_option_passed_over(client: httpx.AsyncClient) -> None:
    for method, path in (("get", "/v1/vms"), ("get", "/v1/migrations/1/events"), ("post", "/v1/vms/web01/vtpm/start")):
        told = problem(await client.request(method, path, params={"by_night": "true"}), "usage.argument", 400)
        assert "by_night" in told.detail


async def test_a_bug_and_a_broken_store_have_it_too(
    client: httpx.AsyncClient, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ValueError("a secret detail")

    monkeypatch.setattr(agent, "describe", broken)
    assert "secret" not in problem(await client.get("/v1/host"), "internal.error", 500).detail
    agent.store.close()
    problem(await client.get("/v1/peers"), "host.store", 500)


async def test_migrations_that_cannot_begin(client: httpx.AsyncClient, agent: Agent, tmp_path: Path) -> None:
    await prepare(client, tmp_path)
    await client.post("/v1/peers", json={"name": "blind", "fingerprint": "SHA256:" + "c" * 64})
    for vm, host, code, status in (
        ("nobody", "host-b", "vm.unknown", 404),
        ("web01", "nobody", "trust.unknown", 404),
        ("web01", "blind", "trust.no-address", 409),
    ):
        problem(await client.post("/v1/migrations", json={"vm": vm, "host": host}), code, status)
    await agent.jobs.stop(0)
    problem(await client.post("/v1/migrations", json={"vm": "web01", "host": "host-b"}), "agent.stopping", 503)
    assert agent.store.migrations() == []


async def test_ready_is_said_before_what_was_left_is_recovered(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that hangs keeps no other VM from being moved; its own VM is held meanwhile."""
    begun, ready = asyncio.Event(), asyncio.Event()

    async def hangs(_: Recovery) -> list[Migration]:
        begun.set()
        await asyncio.Event().wait()
        return []

    monkeypatch.setattr(Recovery, "recover", hangs)
    agent = Agent(paths, Settings(name="host-a"), make_listener=StandInListener, make_source=make_source)
    agent.store.journal(migration(1, state="copying"))
    life = asyncio.create_task(agent.run(ready.set))
    await asyncio.wait_for(ready.wait(), PATIENCE_S)
    await asyncio.wait_for(begun.wait(), PATIENCE_S)
    assert agent.jobs.active_for("web01")
    agent.stop()
    await asyncio.wait_for(life, PATIENCE_S)


async def test_a_recovery_that_fails_is_tried_again(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    tries, thrice = [0], asyncio.Event()

    async def fails(_: Recovery) -> list[Migration]:
        tries[0] += 1
        if tries[0] == 3:
            thrice.set()
            await asyncio.Event().wait()  # a loop without a pause would leave the agent no time to end
        raise RuntimeError("a bug")

    monkeypatch.setattr(Recovery, "recover", fails)
    monkeypatch.setattr("sealane.host.agent.RECOVERY_INTERVAL_S", 0.0)
    agent = Agent(paths, Settings(name="host-a"), make_listener=StandInListener, make_source=make_source)
    agent.store.journal(migration(1, state="copying"))
    life = asyncio.create_task(agent.run())
    await asyncio.wait_for(thrice.wait(), PATIENCE_S)
    assert not life.done()
    assert agent.jobs.active_for("web01")  # not settled, and held
    agent.stop()
    await asyncio.wait_for(life, PATIENCE_S)
    assert tries == [3]


async def test_a_life_on_a_real_socket(paths: Paths) -> None:
    (paths.run / "agent.sock").touch()  # stale
    agent = Agent(paths, Settings(name="host-a"), make_listener=StandInListener, make_source=make_source)
    ready = asyncio.Event()
    life = asyncio.create_task(agent.run(ready.set))
    await asyncio.wait_for(ready.wait(), PATIENCE_S)
    assert stat.S_IMODE(paths.agent_socket.stat().st_mode) == 0o660
    transport = httpx.AsyncHTTPTransport(uds=str(paths.agent_socket))
    async with httpx.AsyncClient(transport=transport, base_url="http://sealane") as client:
        await prepare(client, paths.run)
        problem(await client.get("/v1/vms/nobody"), "vm.unknown", 404)
        await client.post("/v1/migrations", json={"vm": "web01", "host": "host-b"})
        async with client.stream("GET", "/v1/migrations/1/events") as answer:
            lines = answer.aiter_lines()
            assert Event.model_validate_json(await anext(lines)).type == "state"
            assert (await client.post("/v1/migrations/1/cancel")).status_code == 202
            rest = [Event.model_validate_json(line) async for line in lines]
        assert (rest[-1].type, rest[-1].migration.state) == ("end", "aborted")
    agent.stop()
    await asyncio.wait_for(life, PATIENCE_S)
    assert not paths.agent_socket.exists()


PROGRAM = """
import sys
from pathlib import Path
from sealane.host.agent import Agent
from sealane.host.config import Settings
from sealane.host.entrance import run_agent
from sealane.paths import Paths
from tests.host.stand_ins import StandInListener
Agent.__init__.__kwdefaults__["make_listener"] = StandInListener
sys.exit(run_agent(Paths(*map(Path, sys.argv[1:])), Settings(name="host-a")))
"""


async def test_a_process_that_notifies_excludes_a_second_one_and_ends_cleanly(paths: Paths) -> None:
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.bind(str(paths.run / "notify"))
    notify.settimeout(30)
    argv = [sys.executable, "-c", PROGRAM, str(paths.state), str(paths.run), str(paths.config)]
    environment = {**os.environ, "NOTIFY_SOCKET": str(paths.run / "notify")}
    with subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert (await asyncio.to_thread(notify.recv, 4096)).startswith(b"READY=1")
            second = await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, check=False)
            assert "agent.running" in second.stderr
            process.send_signal(signal.SIGUSR1)
            process.send_signal(signal.SIGTERM)
            assert (await asyncio.to_thread(notify.recv, 4096)).startswith(b"STOPPING=1")
            _, log = await asyncio.to_thread(process.communicate, timeout=30)
            assert process.returncode == 0
            assert '"event": "stopped"' in log
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            notify.close()


async def test_metrics(client: httpx.AsyncClient) -> None:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "sealane_peers 0.0" in answer.text
