"""The agent's REST interface on its unix socket, typed, with its problems as Sealane's errors."""

import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

import sealane
from sealane.errors import ControlError, HostError, InternalError, SealaneError, make_error
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
from sealane.host.skew import AGENT_IS_OLDER, CALLER_IS_OLDER, VERSION_HEADER, is_older, names_of, own_version
from sealane.paths import Paths

# Answers wait for QEMU at times (`limits.QMP_TIMEOUT_S`) and, when a migration is asked for, for nothing else.
_ANSWER_TIMEOUT_S: Final = 30.0
_CONNECT_TIMEOUT_S: Final = 3.0
# A doubt is resolved once the other host was asked and QEMU did what follows: each has limits of its own.
_RESOLVE_TIMEOUT_S: Final = 180.0

Answer = TypeVar("Answer", bound=BaseModel)
# How pydantic says that it does not know a field.
_EXTRA: Final = "Extra inputs are not permitted"

_VMS: Final = TypeAdapter(list[Vm])
_PEERS: Final = TypeAdapter(list[Peer])
_HOSTS: Final = TypeAdapter(list[PeerView])
_MIGRATIONS: Final = TypeAdapter(list[Migration])


class AgentGone(ControlError):
    """The agent went away, or fell silent, after it had been asked: what it did of it is not known."""


class AgentClient:
    """One caller of one agent. Raises SealaneError only: the agent's own, `agent.unreachable`, or `host.permission`."""

    def __init__(self, socket: Path | None = None, *, timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        self.socket = Paths.from_environment().agent_socket if socket is None else socket
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))
        # no TLS is spoken here, and by default each client would read all of the system's certificates
        transport = httpx.HTTPTransport(uds=str(self.socket), verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        self._http = httpx.Client(
            transport=transport,
            base_url="http://sealane",
            timeout=timeout,
            trust_env=False,
            headers={VERSION_HEADER: sealane.__version__},
        )

    def __enter__(self) -> "AgentClient":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the socket."""
        self._http.close()

    def host(self) -> Host:
        """Who this agent is."""
        return self._one(Host, "GET", "/v1/host")

    def agents_version(self) -> str | None:
        """The agent's version with its build, as `skew.own_version` has it; None of an agent that does not tell it."""
        told = self._ask("GET", "/v1/host").headers.get(VERSION_HEADER)
        return None if told is None else str(told)

    def total_rate(self) -> TotalRate:
        """The bound of all copies to other hosts together."""
        return self._one(TotalRate, "GET", "/v1/rate")

    def change_total_rate(self, rate: TotalRate) -> TotalRate:
        """Change it, for copies under way too, until the agent ends."""
        return self._one(TotalRate, "PUT", "/v1/rate", rate)

    def metrics(self) -> str:
        """What the agent counts, in Prometheus' text format."""
        return self._ask("GET", "/metrics").text

    def vms(self) -> list[Vm]:
        """All VMs that the agent knows."""
        return self._many(_VMS, "/v1/vms")

    def vm(self, name: str) -> Vm:
        """One VM; raises `vm.unknown`."""
        return self._one(Vm, "GET", f"/v1/vms/{_segment(name)}")

    def pages(self, name: str, *, with_classes: bool) -> PageMap:
        """What a VM's pages are; raises `vm.unknown`, `vm.busy`, `guest.layout`, `guest.memory`."""
        return self._one(PageMap, "GET", f"/v1/vms/{_segment(name)}/pages?classes={str(with_classes).lower()}")

    def add_vm(self, definition: VmDefinition) -> Vm:
        """Register a VM; raises `vm.exists`."""
        return self._one(Vm, "POST", "/v1/vms", definition)

    def remove_vm(self, name: str) -> None:
        """Forget a VM, which runs on; raises `vm.unknown`, `vm.busy`."""
        self._ask("DELETE", f"/v1/vms/{_segment(name)}")

    def peers(self) -> list[Peer]:
        """All hosts that are trusted."""
        return self._many(_PEERS, "/v1/peers")

    def add_peer(self, peer: Peer) -> Peer:
        """Trust a host; raises `trust.exists` where the name has another fingerprint."""
        return self._one(Peer, "POST", "/v1/peers", peer)

    def remove_peer(self, name: str) -> None:
        """Trust a host no longer; raises `trust.unknown`."""
        self._ask("DELETE", f"/v1/peers/{_segment(name)}")

    def invite(self, purpose: str = "pairing") -> PairingStatus:
        """Have the agent show a code for pairing, or for joining its CA (`enrolment`)."""
        return self._one(PairingStatus, "POST", f"/v1/pairing?purpose={purpose}")

    def pairing(self) -> PairingStatus:
        """How the invitation stands; raises `pairing.over` where there was none."""
        return self._one(PairingStatus, "GET", "/v1/pairing")

    def cancel_pairing(self) -> None:
        """Void the code that is shown."""
        self._ask("DELETE", "/v1/pairing")

    def join(self, request: PairingRequest) -> PairingStatus:
        """Pair with the host that shows this code."""
        return self._one(PairingStatus, "POST", "/v1/pairing/join", request)

    def join_fleet(self, request: PairingRequest) -> PairingStatus:
        """Join the CA whose host shows this code."""
        return self._one(PairingStatus, "POST", "/v1/fleet/join", request)

    def fleet(self) -> FleetStatus:
        """How the host stands with its CA; raises `ca.none`."""
        return self._one(FleetStatus, "GET", "/v1/fleet")

    def renew(self) -> FleetStatus:
        """Have the CA appraise the host now; raises what the CA says."""
        return self._one(FleetStatus, "POST", "/v1/fleet/renew")

    def check_policy(self, question: PolicyQuestion) -> PolicyAnswer:
        """What the agent's policy says to a move; raises `vm.unknown`, `trust.unknown`, `policy.broken`."""
        return self._one(PolicyAnswer, "POST", "/v1/policy/check", question)

    def hosts(self, vm: str | None = None) -> list[PeerView]:
        """The trusted hosts with what was last seen of them; with a VM, whether it might go there."""
        return self._many(_HOSTS, "/v1/hosts", None if vm is None else {"vm": vm})

    def start_migration(self, request: MigrationRequest) -> Migration:
        """Have the agent start a migration; it goes on without this client."""
        return self._one(Migration, "POST", "/v1/migrations", request)

    def migrations(self, *, vm: str | None = None, active: bool | None = None) -> list[Migration]:
        """The migrations that the agent remembers, of one VM or only those under way where asked."""
        query = {"vm": vm, "active": None if active is None else str(active).lower()}
        present = {name: value for name, value in query.items() if value is not None}
        return self._many(_MIGRATIONS, "/v1/migrations", present)

    def migration(self, identity: str) -> Migration:
        """One migration; raises `migration.unknown`."""
        return self._one(Migration, "GET", f"/v1/migrations/{_segment(identity)}")

    def cancel(self, identity: str) -> Migration | None:
        """Ask for a migration's end; raises `migration.over`, `migration.too-late`. The outcome comes as an event."""
        answer = self._ask("POST", f"/v1/migrations/{_segment(identity)}/cancel")
        return self._as(Migration, answer) if answer.content else None

    def resolve(self, identity: str, request: ResolveRequest) -> Migration:
        """End a doubt; raises `resolve.…`, `handover.in-doubt`. The agent asks the other host meanwhile."""
        path = f"/v1/migrations/{_segment(identity)}/resolve"
        return self._one(Migration, "POST", path, request, timeout_s=_RESOLVE_TIMEOUT_S)

    def events(self, identity: str) -> Iterator[Event]:
        """The migration's events from its present state to its end; raises AgentGone where the stream breaks off before."""
        ended = False
        try:
            for event in self._stream(f"/v1/migrations/{_segment(identity)}/events"):
                ended = event.type == "end"
                yield event
        except AgentGone:
            if not ended:
                raise
        if not ended:
            raise AgentGone("agent.unreachable", "the agent closed the event stream before the migration's end")

    def group_events(self, group: str) -> Iterator[Event]:
        """The events of all migrations of a group that are under way, until the last one has ended."""
        open_ids: set[str] = set()
        for event in self._stream(f"/v1/groups/{_segment(group)}/events"):
            (open_ids.discard if event.type == "end" else open_ids.add)(event.migration.id)
            yield event
        if open_ids:
            raise AgentGone("agent.unreachable", "the agent closed the event stream before the migrations' ends")

    def _stream(self, path: str) -> Iterator[Event]:
        try:
            timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
            with self._http.stream("GET", path, timeout=timeout) as answer:
                if answer.is_error:
                    answer.read()
                    raise self._refused(answer)
                for line in answer.iter_lines():
                    if line:
                        yield self._event(line, answer)
        except httpx.TransportError as error:
            raise AgentGone("agent.unreachable", "the agent went away in mid-migration") from error

    def vtpm(self, name: str) -> VtpmView:
        """A VM's TPM."""
        return self._one(VtpmView, "GET", f"/v1/vms/{_segment(name)}/vtpm")

    def start_vtpm(self, name: str, *, adopt: bool = False, anew: bool = False, after_crash: bool = False) -> VtpmView:
        """Start a VM's TPM."""
        wishes = {"adopt": adopt, "anew": anew, "after_crash": after_crash}
        query = {key: "true" for key, wanted in wishes.items() if wanted}
        answer = self._ask("POST", f"/v1/vms/{_segment(name)}/vtpm/start", query=query)
        return self._as(VtpmView, answer)

    def change_vtpm(self, name: str, change: Literal["stop", "rotate", "verify"]) -> VtpmView:
        """End, rotate or verify a VM's TPM."""
        return self._one(VtpmView, "POST", f"/v1/vms/{_segment(name)}/vtpm/{change}")

    def _one(
        self,
        model: type[Answer],
        method: str,
        path: str,
        body: BaseModel | None = None,
        *,
        timeout_s: float | None = None,
    ) -> Answer:
        return self._as(model, self._ask(method, path, body, timeout_s=timeout_s))

    def _as(self, model: type[Answer], answer: httpx.Response) -> Answer:
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as error:
            raise self._misfit(error, answer) from error

    def _many(self, adapter: TypeAdapter[list[Answer]], path: str, query: dict[str, str] | None = None) -> list[Answer]:
        answer = self._ask("GET", path, query=query)
        try:
            return adapter.validate_json(answer.content)
        except ValidationError as error:
            raise self._misfit(error, answer) from error

    def _event(self, line: str, answer: httpx.Response) -> Event:
        try:
            return Event.model_validate_json(line)
        except ValidationError as error:
            raise self._misfit(error, answer) from error

    def _ask(
        self,
        method: str,
        path: str,
        body: BaseModel | None = None,
        *,
        query: dict[str, str] | None = None,
        timeout_s: float | None = None,
    ) -> httpx.Response:
        content = None if body is None else body.model_dump_json(exclude_none=True)
        headers = {} if content is None else {"content-type": "application/json"}
        try:
            timeout = self._http.timeout
            if timeout_s is not None:
                timeout = httpx.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S)
            answer = self._http.request(method, path, content=content, headers=headers, params=query, timeout=timeout)
        except httpx.TimeoutException as error:
            kind = ControlError if isinstance(error, httpx.ConnectTimeout) else AgentGone
            raise kind("agent.unreachable", "the agent did not answer in time") from error
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise self._refused(answer)
        return answer

    def _refused(self, answer: httpx.Response) -> SealaneError:
        error = _problem(answer)
        if error.code == "agent.version":
            words = error.detail.partition(": ")[2] or error.detail
            return self._skew(words, answer, error.mend)
        # an agent from before it could say so
        is_old = VERSION_HEADER not in answer.headers and error.code == "usage.argument"
        if is_old and (answer.status_code in {404, 405} or _EXTRA in error.detail):
            return self._skew(f"the agent answers {error.detail!r}", answer, AGENT_IS_OLDER)
        return error

    def _misfit(self, error: ValidationError, answer: httpx.Response) -> SealaneError:
        misfits = [dict(each) for each in error.errors(include_input=False, include_url=False)]
        if answer.headers.get(VERSION_HEADER) == own_version():
            words = f"the agent's answer does not fit ({names_of(misfits)}: {misfits[0]['msg']})"
            return InternalError("internal.error", words)
        mend = CALLER_IS_OLDER if is_older(misfits) else AGENT_IS_OLDER
        return self._skew(f"the agent's answer does not fit ({names_of(misfits)})", answer, mend)

    def _skew(self, words: str, answer: httpx.Response, mend: str) -> SealaneError:
        agent = answer.headers.get(VERSION_HEADER) or "an older one"
        detail = f"this command line is Sealane {own_version()}, and the agent that runs here is {agent}: {words}"
        return make_error("agent.version", detail, mend=mend)

    def _unreachable(self, error: httpx.TransportError) -> SealaneError:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, PermissionError):
                return HostError("host.permission", f"{self.socket} may not be opened by this user")
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx.ConnectError):
            what = "does not accept connections" if _exists(self.socket) else "is not there"
            return ControlError("agent.unreachable", f"no agent answers on this host: {self.socket} {what}")
        return AgentGone("agent.unreachable", "the agent went away before it answered")


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return path.exists()
    return False


def _segment(text: str) -> str:
    """A path segment; names hold no reserved characters, and what a user typed may."""
    return "".join(
        char if char.isascii() and (char.isalnum() or char in "._-") else "".join(f"%{b:02X}" for b in char.encode())
        for char in text
    )


def _problem(answer: httpx.Response) -> SealaneError:
    try:
        problem = Problem.model_validate_json(answer.content)
    except ValidationError:
        return InternalError("internal.error", f"the agent answered HTTP {answer.status_code} without a reason")
    return error_of(problem)


def error_of(problem: Problem) -> SealaneError:
    """The error that a problem tells of; a newer agent's code that is unknown here stays readable."""
    return make_error(problem.code, problem.detail, mend=problem.mend or None)
