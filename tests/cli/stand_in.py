"""A stand-in for the agent: the REST interface on a real unix socket, with the production models, replaying a script."""

import asyncio
import shutil
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import uvicorn
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sealane.errors import SealaneError, make_error
from sealane.host.models import (
    Event,
    Host,
    Migration,
    MigrationRequest,
    Peer,
    Problem,
    Progress,
    Result,
    TotalRate,
    Vm,
    VmDefinition,
)
from sealane.host.skew import Versioned, own_version

# What a script may hold beside events: wait until a cancel was asked for; break the stream off; vanish altogether.
Step = Event | Literal["wait-cancel", "cut", "die", "pause"]

MIGRATION_ID = "0123456789abcdef0123456789abcdef"
FINGERPRINT = "SHA256:" + "7d1f" * 16


def migration(state: str = "preparing", **changes: Any) -> Migration:
    """A migration of web01 to host-b, seen from the source."""
    facts: dict[str, Any] = {
        "id": MIGRATION_ID,
        "number": 213,
        "vm": "web01",
        "role": "source",
        "peer": "host-b",
        "state": state,
        "runs_at": "source",
        "started_at": datetime.now(UTC),
    }
    return Migration.model_validate({**facts, **changes})


CHANNEL = {
    "tls_version": "TLSv1.3",
    "kex_group": "X25519MLKEM768",
    "cipher": "AES-256-GCM",
    "multifd_channels": 2,
}
HALFWAY = Progress(
    bytes_total=4_294_967_296,
    bytes_remaining=1_245_540_515,
    bytes_transferred=2_900_000_000,
    bytes_wire=2_900_000_000,
    rate_bytes_per_s=1.175e9,
    dirty_rate_bytes_per_s=26.25e6,
    iteration=2,
    eta_s=3,
)


def copying(**changes: Any) -> Event:
    return Event(type="progress", migration=migration("copying", **{**CHANNEL, "progress": HALFWAY, **changes}))


def state(name: str, **changes: Any) -> Event:
    return Event(type="state", migration=migration(name, **changes))


def completed() -> Event:
    result = Result(total_ms=4810.2, copy_ms=4300, downtime_ms=31.4, bytes_wire=4_100_000_000)
    return Event(
        type="end",
        migration=migration(
            "completed", runs_at="destination", ended_at=datetime.now(UTC), progress=HALFWAY, result=result, **CHANNEL
        ),
    )


def failed(code: str, *, progress: Progress = HALFWAY, state: str = "aborted", runs_at: str = "source") -> Event:
    return Event(
        type="end",
        migration=migration(
            state, runs_at=runs_at, ended_at=datetime.now(UTC), progress=progress, problem=problem(make_error(code))
        ),
    )


SUCCESS: list[Step] = [
    state("preparing"), state("copying", **CHANNEL), copying(), state("switching-over", **CHANNEL),
    state("handing-over", **CHANNEL), completed(),
]  # fmt: skip


def problem(error: SealaneError) -> Problem:
    return Problem(title=error.code, status=error.http_status, **error.as_dict())  # type: ignore[arg-type]


class StandIn:
    """One agent's socket; `script` is what a migration's event stream replays, from where the last reader left it."""

    def __init__(self) -> None:
        self.run = Path(tempfile.mkdtemp(prefix="sealane-"))
        self.path = self.run / "agent.sock"
        self.vms: dict[str, Vm] = {
            "web01": Vm(name="web01", qmp="/run/web01.qmp", state="running", memory_bytes=4 << 30)
        }
        self.peers: dict[str, Peer] = {
            "host-b": Peer(name="host-b", fingerprint=FINGERPRINT, address="192.0.2.7", port=48217)
        }
        self.script: list[Step] = list(SUCCESS)
        self.latest = migration()
        self.rate = TotalRate(max_bytes_per_s=0)
        self.remembered: list[Migration] = []
        self.requests: list[MigrationRequest] = []
        self.cancels = 0
        self.refusal: SealaneError | None = None
        self.cancel_refusal: SealaneError | None = None
        self.version: str | None = own_version()  # None: from before agents told it
        self._cancelled = threading.Event()

    def __enter__(self) -> "StandIn":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(self.path))
        config = uvicorn.Config(self._app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._server.should_exit = True
        self._thread.join(5)
        shutil.rmtree(self.run, ignore_errors=True)

    def _app(self) -> ASGIApp:
        routes: Sequence[tuple[str, str, Any]] = (
            ("GET", "/v1/host", self._host),
            ("GET", "/v1/rate", self._rate),
            ("PUT", "/v1/rate", self._rate),
            ("GET", "/v1/vms", self._list_vms),
            ("POST", "/v1/vms", self._add_vm),
            ("GET", "/v1/vms/{name}", self._show_vm),
            ("DELETE", "/v1/vms/{name}", self._remove_vm),
            ("GET", "/v1/peers", self._list_peers),
            ("POST", "/v1/peers", self._add_peer),
            ("DELETE", "/v1/peers/{name}", self._remove_peer),
            ("POST", "/v1/migrations", self._start),
            ("GET", "/v1/migrations", self._list_migrations),
            ("GET", "/v1/migrations/{id}", self._show_migration),
            ("GET", "/v1/migrations/{id}/events", self._events),
            ("POST", "/v1/migrations/{id}/cancel", self._cancel),
        )
        app = Starlette(routes=[Route(path, call, methods=[method]) for method, path, call in routes])
        app.add_exception_handler(SealaneError, _as_problem)

        async def versioned(scope: Scope, receive: Receive, send: Send) -> None:
            await (app if self.version is None else Versioned(app, self.version))(scope, receive, send)

        return versioned

    async def _host(self, _: Request) -> Response:
        return _json(
            Host(
                name="host-a",
                version="0.1.0",
                fingerprint=FINGERPRINT,
                not_after=datetime.now(UTC),
                listen="[::]:48217",
                root_of_trust="software",
                migrations_active=0,
            )
        )

    async def _rate(self, request: Request) -> Response:
        if request.method == "PUT":
            self.rate = TotalRate.model_validate_json(await request.body())
        return _json(self.rate)

    async def _list_vms(self, _: Request) -> Response:
        return _json(list(self.vms.values()))

    async def _add_vm(self, request: Request) -> Response:
        definition = VmDefinition.model_validate_json(await request.body())
        if definition.name in self.vms:
            raise make_error("vm.exists")
        self.vms[definition.name] = Vm(**definition.model_dump(), state="running")
        return _json(self.vms[definition.name], status=201)

    async def _show_vm(self, request: Request) -> Response:
        return _json(self._vm(request))

    async def _remove_vm(self, request: Request) -> Response:
        del self.vms[self._vm(request).name]
        return Response(status_code=204)

    def _vm(self, request: Request) -> Vm:
        name = request.path_params["name"]
        if name not in self.vms:
            raise make_error("vm.unknown", f"no VM {name} is known here")
        return self.vms[name]

    async def _list_peers(self, _: Request) -> Response:
        return _json(list(self.peers.values()))

    async def _add_peer(self, request: Request) -> Response:
        peer = Peer.model_validate_json(await request.body())
        if peer.name in self.peers and self.peers[peer.name].fingerprint != peer.fingerprint:
            raise make_error("trust.exists")
        self.peers[peer.name] = peer
        return _json(peer, status=201)

    async def _remove_peer(self, request: Request) -> Response:
        if self.peers.pop(request.path_params["name"], None) is None:
            raise make_error("trust.unknown")
        return Response(status_code=204)

    async def _start(self, request: Request) -> Response:
        self.requests.append(MigrationRequest.model_validate_json(await request.body()))
        if self.refusal is not None:
            raise self.refusal
        self.remembered.append(self.latest)
        return _json(self.latest, status=202)

    async def _list_migrations(self, request: Request) -> Response:
        query = request.query_params
        active = query.get("active") == "true"
        chosen = [
            one
            for one in sorted(self.remembered, key=lambda one: -one.number)
            if query.get("vm") in {None, one.vm} and not (active and one.state in {"completed", "aborted"})
        ]
        return _json(chosen)

    async def _show_migration(self, request: Request) -> Response:
        known = [*self.remembered, self.latest]
        for one in reversed(known):
            if request.path_params["id"] in {one.id, str(one.number)}:
                return _json(self.latest if one.id == self.latest.id else one)
        raise make_error("migration.unknown")

    async def _cancel(self, _: Request) -> Response:
        self.cancels += 1
        if self.cancel_refusal is not None:
            raise self.cancel_refusal
        self._cancelled.set()
        return _json(self.latest, status=202)

    async def _events(self, _: Request) -> Response:
        return StreamingResponse(self._lines(), media_type="application/x-ndjson")

    async def _lines(self) -> AsyncIterator[str]:
        yield Event(type="state", migration=self.latest).model_dump_json() + "\n"
        while self.script:
            step = self.script[0]
            if isinstance(step, Event):
                self.latest = step.migration
                self.script.pop(0)
                yield step.model_dump_json() + "\n"
                if step.type == "end":
                    return
            elif step == "wait-cancel":
                await asyncio.to_thread(self._cancelled.wait)
                self.script.pop(0)
            elif step == "pause":
                await asyncio.sleep(0.3)
                self.script.pop(0)
            else:
                self.script.pop(0)
                self._break(step)

    def _break(self, how: str) -> None:
        if how == "die":
            with suppress(FileNotFoundError):
                self.path.unlink()
        raise ConnectionError("the script breaks the stream off here")


def _json(value: BaseModel | Sequence[BaseModel], *, status: int = 200) -> Response:
    several = [] if isinstance(value, BaseModel) else [one.model_dump_json() for one in value]
    text = value.model_dump_json() if isinstance(value, BaseModel) else f"[{','.join(several)}]"
    return Response(text, status_code=status, media_type="application/json")


async def _as_problem(_: Request, error: Exception) -> Response:
    if not isinstance(error, SealaneError):
        raise error
    return Response(
        problem(error).model_dump_json(), status_code=error.http_status, media_type="application/problem+json"
    )
