"""The agent's REST interface, on a unix socket. Every answer that is not 2xx is a `Problem`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Final, Protocol

import structlog
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

import sealane
from sealane.errors import SealaneError, UsageError, make_error
from sealane.host import skew
from sealane.host.callers import caller_of_uid
from sealane.host.fleet.renewing import FleetHostSide
from sealane.host.jobs import Jobs
from sealane.host.metrics import MEDIA_TYPE as MEDIA_TYPE_OF_METRICS
from sealane.host.metrics import Metrics
from sealane.host.models import (
    Event,
    FleetStatus,
    Host,
    Migration,
    MigrationRequest,
    PageMap,
    PairingRequest,
    PairingStatus,
    Peer,
    PeerView,
    PolicyAnswer,
    PolicyQuestion,
    Problem,
    ResolveRequest,
    TotalRate,
    Vm,
    VmDefinition,
    VtpmView,
)
from sealane.host.pairing import PairingDesk
from sealane.host.peers import Peers
from sealane.host.policy import UNKNOWN_CALLER, Caller
from sealane.host.problems import MEDIA_TYPE, problem_of
from sealane.host.rates import SharedRate
from sealane.host.registry import Registry
from sealane.host.skew import VERSION_HEADER
from sealane.host.vtpm import Vtpms
from sealane.limits import DEFAULT_PORT
from sealane.session.pairing import Purpose

NDJSON: Final = "application/x-ndjson"
_DESCRIPTION: Final = """
The agent of one host, on a unix socket (`curl --unix-socket /run/sealane/agent.sock http://sealane/v1/host`).

Every error is an `application/problem+json` (RFC 9457) with Sealane's `code` and what usually mends it.
"""
_TAGS: Final = [
    {"name": "host", "description": "Who this agent is."},
    {"name": "vms", "description": "The VMs of this host and their states."},
    {"name": "vtpms", "description": "The VMs' own TPMs."},
    {"name": "peers", "description": "The hosts whose certificates are trusted."},
    {"name": "pairing", "description": "Trust between two hosts by a short code."},
    {"name": "fleet", "description": "The CA that this host belongs to."},
    {"name": "policy", "description": "What the policy would say, and what is known of the hosts."},
    {"name": "migrations", "description": "Migrations, in both directions: begin, watch, cancel, look back."},
]


class ApiAgent(Protocol):
    """What the interface needs of the agent."""

    registry: Registry
    peers: Peers
    jobs: Jobs
    pairing: PairingDesk
    metrics: Metrics
    vtpms: Vtpms
    fleet: FleetHostSide
    rates: SharedRate

    def describe(self) -> Host:
        """Who this agent is."""

    async def inspect_pages(self, name: str, *, with_classes: bool) -> PageMap:
        """What a VM's pages are."""

    async def begin_migration(self, request: MigrationRequest, caller: Caller = UNKNOWN_CALLER) -> Migration:
        """Begin to move a VM away."""

    async def start_vtpm(self, name: str, *, adopt: bool, anew: bool, after_crash: bool) -> VtpmView:
        """Start a VM's TPM."""

    async def stop_vtpm(self, name: str) -> VtpmView:
        """End a VM's TPM."""

    async def rotate_vtpm(self, name: str) -> VtpmView:
        """Put a VM's TPM under a new key."""

    async def resolve(self, reference: str, request: ResolveRequest, caller: Caller = UNKNOWN_CALLER) -> Migration:
        """End a doubt."""

    def check_policy(self, question: PolicyQuestion, caller: Caller) -> PolicyAnswer:
        """What the policy would say."""

    def hosts(self, vm: str | None, caller: Caller) -> list[PeerView]:
        """The trusted hosts, and whether the policy would let a VM go there."""


def _problem_response(problem: Problem) -> JSONResponse:
    return JSONResponse(problem.model_dump(), status_code=problem.status, media_type=MEDIA_TYPE)


def _sentence(error: RequestValidationError) -> str:
    """The first thing wrong with a request, without repeating its content."""
    first: Any = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    return f"{where or 'body'}: {first['msg']}"


def _misfit(request: Request, error: RequestValidationError) -> SealaneError:
    """A command line sends only what fits its own models: what does not fit ours is of another version."""
    caller = request.headers.get(VERSION_HEADER)
    if caller is None:
        return UsageError("usage.argument", _sentence(error))
    misfits = error.errors()
    older = skew.is_older(misfits)
    words = f"it does not know {skew.names_of(misfits)}" if older else _sentence(error)
    return skew.refusal(caller, words, agent_is_older=older)


def _known_options(request: Request) -> None:
    """A dependency of every path: an option that a path does not have is refused, and not passed over."""
    route = request.scope["route"]
    known = {parameter.alias for parameter in route.dependant.query_params}
    if unknown := sorted(set(request.query_params) - known):
        raise RequestValidationError(
            [{"type": "extra_forbidden", "loc": ("query", name), "msg": "no such option"} for name in unknown]
        )


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(SealaneError)
    async def _on_sealane_error(_request: Request, error: SealaneError) -> Response:
        return _problem_response(problem_of(error))

    @app.exception_handler(RequestValidationError)
    async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
        return _problem_response(problem_of(_misfit(request, error)))

    @app.exception_handler(HTTPException)
    async def _on_http_error(request: Request, error: HTTPException) -> Response:
        detail = f"{request.method} {request.url.path}: {error.detail}"
        if (caller := request.headers.get(VERSION_HEADER)) is not None:
            return _problem_response(problem_of(skew.refusal(caller, detail, agent_is_older=True)))
        problem = problem_of(UsageError("usage.argument", detail, mend="see /openapi.json for what there is"))
        response = _problem_response(
            problem.model_copy(update={"status": error.status_code, "title": str(error.detail)})
        )
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _on_bug(request: Request, error: Exception) -> Response:
        structlog.get_logger().error("request failed", path=request.url.path, exc_info=error)
        return _problem_response(problem_of(error))


_ERRORS: Final[dict[int | str, dict[str, Any]]] = {
    "default": {
        "description": "What is wrong, and what mends it.",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    },
}


def create_app(agent: ApiAgent) -> FastAPI:
    """The interface over one agent. No documentation pages: theirs load scripts from other hosts."""
    app = FastAPI(
        title="Sealane agent",
        version=sealane.__version__,
        description=_DESCRIPTION,
        openapi_tags=_TAGS,
        docs_url=None,
        redoc_url=None,
        responses=_ERRORS,
        dependencies=[Depends(_known_options)],
    )
    app.add_middleware(skew.Versioned)
    _add_error_handlers(app)
    _add_host(app, agent)
    _add_vms(app, agent)
    _add_vtpms(app, agent)
    _add_peers(app, agent)
    _add_pairing(app, agent)
    _add_fleet(app, agent)
    _add_policy(app, agent)
    _add_migrations(app, agent)
    _describe_problem(app)
    return app


def _describe_problem(app: FastAPI) -> None:
    """Put `Problem` into the description in place of FastAPI's own validation errors, which are never sent."""
    make_openapi: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make_openapi()
            schemas = schema.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas["Problem"] = Problem.model_json_schema()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_host(app: FastAPI, agent: ApiAgent) -> None:
    @app.get("/v1/host", tags=["host"], summary="This host")
    async def get_host() -> Host:
        """Name, version, fingerprint and address of this agent."""
        return agent.describe()

    @app.get("/v1/rate", tags=["host"], summary="The total rate")
    async def get_rate() -> TotalRate:
        """The bound of all copies to other hosts together."""
        return TotalRate(max_bytes_per_s=agent.rates.total_bytes_per_s)

    @app.put("/v1/rate", tags=["host"], summary="Change the total rate")
    async def put_rate(rate: TotalRate) -> TotalRate:
        """Change the bound of all copies to other hosts together, those under way too, until the agent ends."""
        agent.rates.total_bytes_per_s = rate.max_bytes_per_s
        structlog.get_logger().info("total rate changed", max_bytes_per_s=rate.max_bytes_per_s)
        return rate

    @app.get(
        "/metrics",
        tags=["host"],
        summary="Metrics",
        response_class=PlainTextResponse,
        responses={200: {"description": "Prometheus' text format, 0.0.4.", "content": {"text/plain": {}}}},
    )
    async def get_metrics() -> Response:
        """What this agent counts, for Prometheus; docs/metrics.md has the table."""
        return Response(agent.metrics.exposition(), media_type=MEDIA_TYPE_OF_METRICS)


def _add_vms(app: FastAPI, agent: ApiAgent) -> None:
    @app.get("/v1/vms", tags=["vms"], summary="All VMs")
    async def list_vms() -> list[Vm]:
        """All VMs with their states, looked up now; a VM that does not answer is told as such."""
        return await agent.registry.list()

    @app.post("/v1/vms", tags=["vms"], summary="Register a VM", status_code=201)
    async def add_vm(vm: VmDefinition) -> Vm:
        """Make a VM known by its QMP socket, and how it is launched here to receive it."""
        agent.vtpms.prepare([agent.registry.add(vm)])
        return await agent.registry.look(vm.name)

    @app.get("/v1/vms/{name}", tags=["vms"], summary="One VM")
    async def get_vm(name: str) -> Vm:
        """One VM with its state."""
        return await agent.registry.look(name)

    @app.get("/v1/vms/{name}/pages", tags=["vms"], summary="What a VM's pages are")
    async def get_pages(
        name: str, classes: Annotated[bool, Query(description="The class of every page too.")] = False
    ) -> PageMap:
        """Pages by class: user, kernel, free, other; read from outside by a short-lived enclave while the VM runs."""
        return await agent.inspect_pages(name, with_classes=classes)

    @app.delete("/v1/vms/{name}", tags=["vms"], summary="Forget a VM", status_code=204)
    async def remove_vm(name: str) -> None:
        """Forget a VM; it runs on."""
        agent.registry.remove(name)


def _add_vtpms(app: FastAPI, agent: ApiAgent) -> None:
    @app.get("/v1/vms/{name}/vtpm", tags=["vtpms"], summary="A VM's TPM")
    async def get_vtpm(name: str) -> VtpmView:
        """Whether the VM's TPM is here, runs, and under what its files are."""
        return await agent.vtpms.status(name)

    @app.post("/v1/vms/{name}/vtpm/start", tags=["vtpms"], summary="Start a VM's TPM")
    async def start_vtpm(
        name: str,
        adopt: Annotated[bool, Query(description="Take over state that lies in its directory in clear.")] = False,
        anew: Annotated[bool, Query(description="Make a new one although one was here and left.")] = False,
        after_crash: Annotated[
            bool, Query(description="Take files that its last launch wrote and did not note.")
        ] = False,
    ) -> VtpmView:
        """Start it, made anew where there was none; QEMU may be started afterwards."""
        return await agent.start_vtpm(name, adopt=adopt, anew=anew, after_crash=after_crash)

    @app.post("/v1/vms/{name}/vtpm/stop", tags=["vtpms"], summary="End a VM's TPM")
    async def stop_vtpm(name: str) -> VtpmView:
        """End it; a VM that runs loses it."""
        return await agent.stop_vtpm(name)

    @app.post("/v1/vms/{name}/vtpm/rotate", tags=["vtpms"], summary="Put a VM's TPM under a new key")
    async def rotate_vtpm(name: str) -> VtpmView:
        """A VM that runs is paused meanwhile."""
        return await agent.rotate_vtpm(name)

    @app.post("/v1/vms/{name}/vtpm/verify", tags=["vtpms"], summary="Verify a VM's TPM")
    async def verify_vtpm(name: str) -> VtpmView:
        """Whether files, record and counter are what was written last."""
        return await agent.vtpms.verify(name)


def _add_peers(app: FastAPI, agent: ApiAgent) -> None:
    @app.get("/v1/peers", tags=["peers"], summary="All trusted hosts")
    async def list_peers() -> list[Peer]:
        """All hosts whose certificates are trusted."""
        return agent.peers.list()

    @app.post("/v1/peers", tags=["peers"], summary="Trust a host", status_code=201)
    async def add_peer(peer: Peer) -> Peer:
        """Trust a certificate by its fingerprint; the same again changes only the address."""
        return agent.peers.add(peer)

    @app.delete("/v1/peers/{name}", tags=["peers"], summary="Trust a host no longer", status_code=204)
    async def remove_peer(name: str) -> None:
        """Trust a host no longer; migrations in progress go on."""
        agent.peers.remove(name)


def _add_pairing(app: FastAPI, agent: ApiAgent) -> None:
    @app.post("/v1/pairing", tags=["pairing"], summary="Show a code", status_code=201)
    async def invite(
        purpose: Annotated[Purpose, Query(description="`enrolment`: let a host join the CA of this one.")] = "pairing",
    ) -> PairingStatus:
        """Show a new code and wait for a host that is given it; an earlier code is void."""
        return agent.pairing.invite(purpose)

    @app.get("/v1/pairing", tags=["pairing"], summary="How it stands")
    async def pairing_status() -> PairingStatus:
        """The code that is shown, or whom it led to, or why it failed."""
        return agent.pairing.status()

    @app.delete("/v1/pairing", tags=["pairing"], summary="Void the code", status_code=204)
    async def cancel_pairing() -> None:
        """Void the code that is shown."""
        agent.pairing.cancel()

    @app.post("/v1/pairing/join", tags=["pairing"], summary="Use a code")
    async def join(request: PairingRequest) -> PairingStatus:
        """Pair with the host that shows this code."""
        return await agent.pairing.join(request.host, request.port or DEFAULT_PORT, request.code)


def _add_fleet(app: FastAPI, agent: ApiAgent) -> None:
    @app.post("/v1/fleet/join", tags=["fleet"], summary="Join a CA")
    async def join_fleet(request: PairingRequest) -> PairingStatus:
        """Join the CA whose host shows this code, and have it issue a first certificate."""
        joined = await agent.pairing.join(request.host, request.port or DEFAULT_PORT, request.code, "enrolment")
        await agent.fleet.renew("certificate")
        return joined

    @app.get("/v1/fleet", tags=["fleet"], summary="How this host stands with its CA")
    async def fleet_status() -> FleetStatus:
        """What the CA issued for this host, how old its list is, and which hosts belong to it."""
        return agent.fleet.status()

    @app.post("/v1/fleet/renew", tags=["fleet"], summary="Renew now")
    async def renew() -> FleetStatus:
        """Have the CA appraise this host anew, and fetch its revocation list."""
        await agent.fleet.renew("certificate")
        return agent.fleet.status()


def _add_policy(app: FastAPI, agent: ApiAgent) -> None:
    @app.post("/v1/policy/check", tags=["policy"], summary="Would it be allowed?")
    async def check_policy(question: PolicyQuestion, http: Request) -> PolicyAnswer:
        """What this host's policy says to a move, and why. Nothing is moved, and the other host is not asked."""
        return agent.check_policy(question, await _caller(http))

    @app.get("/v1/hosts", tags=["policy"], summary="Trusted hosts and their levels")
    async def list_hosts(
        http: Request, vm: Annotated[str | None, Query(description="Whether this VM might go there.")] = None
    ) -> list[PeerView]:
        """All trusted hosts with what was last seen of them."""
        return agent.hosts(vm, await _caller(http))


async def _caller(request: Request) -> Caller:
    """Who asks; the user database may be slow, and is asked in a thread."""
    uid = getattr(request.state, "caller_uid", None)
    return UNKNOWN_CALLER if uid is None else await asyncio.to_thread(caller_of_uid, uid)


def _add_migrations(app: FastAPI, agent: ApiAgent) -> None:
    @app.post("/v1/migrations", tags=["migrations"], summary="Move a VM", status_code=202)
    async def begin_migration(request: MigrationRequest, http: Request) -> Migration:
        """Begin to move a VM; how it goes on is told by its events."""
        return await agent.begin_migration(request, await _caller(http))

    @app.get("/v1/migrations", tags=["migrations"], summary="Migrations, the newest first")
    async def list_migrations(
        vm: Annotated[str | None, Query(description="Only those of this VM.")] = None,
        active: Annotated[bool, Query(description="Only those that have not ended.")] = False,
    ) -> list[Migration]:
        """The last 200 migrations, the newest first."""
        return agent.jobs.list(vm=vm, active=active)

    @app.get("/v1/migrations/{id}", tags=["migrations"], summary="One migration")
    async def get_migration(id: str) -> Migration:
        """One migration, by its id, its number or the beginning of its id."""
        return agent.jobs.find(id)

    @app.get(
        "/v1/migrations/{id}/events",
        tags=["migrations"],
        summary="Watch a migration",
        response_class=StreamingResponse,
        responses={200: {"description": "One `Event` a line.", "content": {NDJSON: {"schema": {"type": "string"}}}}},
    )
    async def watch_migration(id: str) -> StreamingResponse:
        """Events as NDJSON: the first line tells the present state, the last one has type "end"."""
        agent.jobs.find(id)  # an unknown one is a 404, not an empty stream
        return StreamingResponse(_lines(agent.jobs.events(id)), media_type=NDJSON)

    @app.get(
        "/v1/groups/{group}/events",
        tags=["migrations"],
        summary="Watch the migrations of a group",
        response_class=StreamingResponse,
        responses={200: {"description": "One `Event` a line.", "content": {NDJSON: {"schema": {"type": "string"}}}}},
    )
    async def watch_group(group: str) -> StreamingResponse:
        """Events of all migrations that were asked for with this `group` and are under way, until each has told its end."""
        if not any(migration.group == group for migration in agent.jobs.list()):
            raise make_error("migration.unknown", f"no migration of a group {group!r}")
        return StreamingResponse(_lines(agent.jobs.events_of_group(group)), media_type=NDJSON)

    @app.post("/v1/migrations/{id}/cancel", tags=["migrations"], summary="Cancel a migration", status_code=202)
    async def cancel_migration(id: str) -> Migration:
        """Ask a migration to end; the VM then runs on at the source. Too late once the hand-over has begun."""
        return agent.jobs.cancel(id)

    @app.post("/v1/migrations/{id}/resolve", tags=["migrations"], summary="End a doubt")
    async def resolve_migration(id: str, request: ResolveRequest, http: Request) -> Migration:
        """Ask the destination what became of a migration that is in doubt here, and do as it says, or as the operator does.

        Of one that is `postcopy-paused`: have its halves joined again now, or end the half here. 409 `handover.in-doubt` and
        `resolve.parted` where `ask` did not settle it, `resolve.…` where the word was refused.
        """
        return await agent.resolve(id, request, await _caller(http))


async def _lines(events: AsyncIterator[Event]) -> AsyncIterator[str]:
    async for event in events:
        yield event.model_dump_json() + "\n"
