"""The agent: composition root of one host, and its life to a clean exit."""

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

import structlog
import uvicorn

import sealane
from sealane.crypto.identity import load_identity
from sealane.errors import SealaneError, make_error
from sealane.host.api import create_app
from sealane.host.callers import CallerProtocol, caller_called
from sealane.host.config import VMS_FILE, Settings
from sealane.host.doubts import Doubts
from sealane.host.fleet.known import KnownHostsFile
from sealane.host.fleet.membership import Membership
from sealane.host.fleet.office import Office
from sealane.host.fleet.registry import Registry as FleetRegistry
from sealane.host.fleet.renewing import EnrolmentTerms, FleetHostSide, KnownFleet, shown_reference
from sealane.host.halves import Halves
from sealane.host.job import Job
from sealane.host.jobs import Jobs
from sealane.host.limits import least_rate
from sealane.host.listener import PeerListener
from sealane.host.metrics import Metrics
from sealane.host.migration.asking import ask_peer
from sealane.host.migration.dialling import remove_socket_directories
from sealane.host.migration.domain_source import DomainSource
from sealane.host.migration.enclave_launcher import EnclaveLauncher
from sealane.host.migration.rejoining import RejoiningSource
from sealane.host.migration.source import SourceMigration
from sealane.host.models import (
    Host,
    Migration,
    MigrationRequest,
    PageMap,
    Peer,
    PeerTrust,
    PeerView,
    PolicyAnswer,
    PolicyQuestion,
    ResolveRequest,
    VmDefinition,
    VtpmView,
)
from sealane.host.notify import notify
from sealane.host.pages import inspect_pages
from sealane.host.pairing import PairingDesk, PeerTerms
from sealane.host.peers import Peers
from sealane.host.policy import UNKNOWN_CALLER, Caller, Move, load_policy
from sealane.host.proving import TpmProving
from sealane.host.queue import Turn
from sealane.host.quoting import QuotingService, incoming_binaries
from sealane.host.rates import SharedRate
from sealane.host.receipts.chain import Receipts
from sealane.host.recovery import Recovery
from sealane.host.registry import Registry
from sealane.host.store import Store, utc_now
from sealane.host.vtpm import Vtpms
from sealane.hypervisor.launch import trim_log
from sealane.hypervisor.qmp import QmpMachine
from sealane.libvirt.domains import is_domain
from sealane.limits import QEMU_LOG_INTERVAL_S, RECOVERY_INTERVAL_S
from sealane.paths import Paths
from sealane.seal.protect import check_wanted

# How long open REST requests may take once the migrations have ended.
API_GRACE_S: Final = 2


class Listener(Protocol):
    """What accepts peers; `sealane.host.listener.PeerListener` in earnest."""

    async def start(self) -> None:
        """Open the port; raises `host.port`."""

    async def stop(self) -> None:
        """Close the port; what was accepted goes on."""


MakeListener = Callable[["Agent"], Listener]
MakeSource = Callable[["Agent", MigrationRequest, VmDefinition, Peer, Migration], Job]


def _make_listener(agent: "Agent") -> Listener:
    return PeerListener(agent, agent.settings, agent.pairing.welcome, agent.office.welcome)


def _make_source(
    agent: "Agent", request: MigrationRequest, vm: VmDefinition, peer: Peer, migration: Migration
) -> SourceMigration:
    kind = DomainSource if is_domain(vm.qmp) else SourceMigration
    return kind(agent, request, vm, peer, migration)


class Agent:
    """One host's agent. `run` is its whole life; `stop` ends it gracefully."""

    def __init__(
        self,
        paths: Paths,
        settings: Settings,
        *,
        make_listener: MakeListener = _make_listener,
        make_source: MakeSource = _make_source,
    ) -> None:
        self.paths = paths
        self.settings = settings
        self.log = structlog.get_logger().bind(host=settings.name)
        self.identity = load_identity(paths)
        self.store = Store(paths.database)
        self.receipts = Receipts(paths.state, self.store, self.identity, self.identity.name)
        self.metrics = Metrics()
        self.jobs = Jobs(self.store, limits=settings.limits, issue=self.receipts.issue, observer=self.metrics)
        self.rates = SharedRate(settings.limits.total_rate_max_bytes_per_s)
        self.membership = Membership(paths, settings, self.identity)
        self.peers = Peers(self.store, self.membership.peers)
        self.registry = Registry(self.store, paths.config / VMS_FILE, self.jobs, libvirt=settings.libvirt)
        self.vtpms = Vtpms(paths, settings, self.store, self.registry.get)
        self.quoting = QuotingService(paths, settings.attestation)
        self.office = Office(self, FleetRegistry(paths.authority), utc_now)
        self.fleet = FleetHostSide(self, self.membership, utc_now)
        known = KnownHostsFile(paths)
        self.membership.on_change = KnownFleet(self.membership, known).refresh
        self.peers.on_remove = lambda name: known.note_paired(name, None)
        pairing = PeerTerms(self, lambda: shown_reference(paths, settings), known.note_paired)
        enrolment = EnrolmentTerms(self, self.office, self.membership)
        proving = TpmProving(self.quoting.connect_agent)
        self.pairing = PairingDesk(self, terms={"pairing": pairing, "enrolment": enrolment}, proving=proving)
        self.listener = make_listener(self)
        self.launcher = EnclaveLauncher(sandbox=settings.sandbox, user=settings.enclave_user)
        self.metrics.look_at(_Facts(self))
        self._make_source = make_source
        self._doubts: Doubts | None = None
        self._halves: Halves | None = None
        self._stop = asyncio.Event()
        self._inspecting = asyncio.Semaphore(1)

    # The interface's wishes

    def describe(self) -> Host:
        """Who this agent is; the address is the listener's own where it knows better (port 0)."""
        configured = f"[{self.settings.listen}]" if ":" in self.settings.listen else self.settings.listen
        return Host(
            name=self.settings.name,
            version=sealane.__version__,
            fingerprint=self.identity.fingerprint,
            not_after=self.identity.not_after,
            listen=str(getattr(self.listener, "address", None) or f"{configured}:{self.settings.port}"),
            root_of_trust=self.quoting.root_of_trust,
            migrations_active=self.jobs.active_count,
        )

    @property
    def port(self) -> int:
        """Where this agent listens for peers."""
        address = getattr(self.listener, "address", None)
        return int(str(address).rpartition(":")[2]) if address else self.settings.port

    def binaries(self) -> list[str]:
        """QEMU's binaries that may receive a VM here."""
        return incoming_binaries(vm.launch_incoming for vm, _ in self.registry.definitions().values())

    async def inspect_pages(self, name: str, *, with_classes: bool) -> PageMap:
        """What the pages of a VM are; see `sealane.host.pages`."""
        async with self._inspecting:  # each reads all that a guest has touched
            return await inspect_pages(self, name, with_classes=with_classes)

    async def begin_migration(self, request: MigrationRequest, caller: Caller = UNKNOWN_CALLER) -> Migration:
        """Begin to move a VM away, or have it wait for its turn.

        Raises `vm.unknown`, `trust.unknown`, `trust.no-address`, `protection.weak`, `protection.not-allowed`, and what
        `Jobs.begin` does.
        """
        await self.registry.domains.find()
        await self.jobs.let_go(request.vm)
        vm = self.registry.get(request.vm)
        peer = self.peers.get(request.host)
        if peer.address is None:
            raise make_error("trust.no-address", f"{peer.name} has no address")
        check_wanted(
            request.protection,
            is_known_weak=request.i_know_this_is_weak,
            allowed=self.settings.allowed_protections,
        )
        limits = self.settings.limits
        rate = least_rate(request.max_bandwidth_bytes_per_s, limits.rate_for(vm.name, peer.name))
        request = request.model_copy(update={"max_bandwidth_bytes_per_s": rate})

        def check_again() -> None:
            if self.peers.get(peer.name) != peer or self.registry.get(vm.name) != vm:
                raise make_error("queue.changed", f"{peer.name} or {vm.name} was changed while the migration waited")

        job = self.jobs.begin(
            lambda migration: self._make_source(self, request, vm, peer, migration),
            vm=vm.name,
            role="source",
            peer=peer.name,
            qmp=vm.qmp,
            requested_by=caller.name,
            protection=request.protection,
            turn=Turn(
                priority=limits.priority_of(vm.name) if request.priority is None else request.priority,
                group=request.group,
                group_max=request.group_max,
                time_max_s=request.time_limit_s or math.inf,
                check_again=check_again,
            ),
        )
        return job.migration

    async def resolve(self, reference: str, request: ResolveRequest, caller: Caller = UNKNOWN_CALLER) -> Migration:
        """End a doubt, or see to halves that stay parted; see `Doubts.resolve`, `Halves.resolve`."""
        migration = self.jobs.find(reference)
        if self._doubts is None or self._halves is None:  # they are there before the interface is
            raise make_error("agent.stopping", f"migration {migration.number} cannot be resolved now")
        if migration.state == "postcopy-paused":
            return await self._halves.resolve(migration, request, caller.name)
        return await self._doubts.resolve(reference, request, caller.name)

    def check_policy(self, question: PolicyQuestion, caller: Caller) -> PolicyAnswer:
        """What this host's policy says to a move; raises `vm.unknown`, `trust.unknown`, `policy.broken`."""
        vm, peer = self.registry.get(question.vm), self.peers.get(question.host)
        trust = self.store.sightings().get(peer.fingerprint) or PeerTrust()
        if question.level is not None:
            trust = PeerTrust(level=question.level, production_level=question.level, root="as asked")
        if question.user is not None:
            caller = caller_called(question.user)
        allowed = self.settings.allowed_protections
        move = Move(question.direction, vm, peer.name, peer.fingerprint, trust, question.protection, caller, allowed)
        return PolicyAnswer(
            decision=load_policy(self.paths.config).decide(move),
            vm=vm.name,
            host=peer.name,
            direction=question.direction,
            protection=question.protection,
            least_level=vm.least_level,
            user=caller.name if question.direction == "send" else None,
            trust=trust,
        )

    def hosts(self, vm: str | None, caller: Caller) -> list[PeerView]:
        """The trusted hosts with what was last seen of them; with a VM, whether it might go there."""
        seen, known = self.store.sightings(), KnownHostsFile(self.paths).read()
        found = []
        for peer in self.peers.everyone():
            answer = None if vm is None else self.check_policy(PolicyQuestion(vm=vm, host=peer.name), caller)
            found.append(
                PeerView(
                    **peer.model_dump(),
                    trust=seen.get(peer.fingerprint) or PeerTrust(),
                    decision=None if answer is None else answer.decision,
                    hardware=known.hardware_of(peer.name),
                    trusted_by="certificate" if self.peers.is_trusted(peer) else "ca",
                )
            )
        return found

    async def start_vtpm(self, name: str, *, adopt: bool, anew: bool, after_crash: bool) -> VtpmView:
        """Start a VM's TPM; raises `vm.busy` during a migration, and what `Vtpms.start` does."""
        self._check_idle(name)
        return await self.vtpms.start(name, adopt=adopt, anew=anew, after_crash=after_crash)

    async def stop_vtpm(self, name: str) -> VtpmView:
        """End a VM's TPM; raises `vm.busy`."""
        self._check_idle(name)
        return await self.vtpms.stop(name)

    async def rotate_vtpm(self, name: str) -> VtpmView:
        """Put a VM's TPM under a new key, the VM paused for a moment where it runs; raises `vm.busy`."""
        self._check_idle(name)
        return await self.vtpms.rotate(name, self._paused)

    def _check_idle(self, name: str) -> None:
        if busy := self.jobs.active_for(name):
            raise make_error("vm.busy", f"{name} is in migration {busy.number} ({busy.state})")

    @contextlib.asynccontextmanager
    async def _paused(self, vm: VmDefinition) -> AsyncIterator[None]:
        async with QmpMachine.connect(vm.qmp, self.settings.limits.qmp_timeout_s) as qemu:
            was_running = await qemu.run_state() == "running"
            if was_running:
                await qemu.stop()
            try:
                yield
            finally:
                if was_running:
                    await qemu.resume()

    # Life

    def stop(self) -> None:
        """Begin to end: no new migrations, a grace for those that run, then a clean exit."""
        self._stop.set()

    async def run(self, on_ready: Callable[[], None] | None = None) -> None:
        """Serve until `stop`, recover meanwhile what was left, end cleanly."""
        try:
            async with AsyncExitStack() as stack:
                recovery = Recovery(
                    self.store,
                    self.jobs,
                    self._find_qmp,
                    qmp_timeout_s=self.settings.limits.qmp_timeout_s,
                    rejoin=self._rejoin,
                )
                self._doubts = Doubts(
                    self.jobs,
                    recovery,
                    lambda entry: ask_peer(self, entry),
                    first_pause_s=self.settings.limits.ask_first_pause_s,
                )
                self._halves = Halves(self.jobs, recovery, lambda entry: ask_peer(self, entry), self._rejoin)
                remove_socket_directories(self.paths.run)
                for migration in self.receipts.catch_up():
                    self.log.info("receipt written late", migration=migration.id[:8], receipt=migration.receipt)
                await self._serve(stack, recovery, self._doubts)
                self.log.info("ready", listen=self.describe().listen, socket=str(self.paths.agent_socket))
                notify("READY=1", f"STATUS=listening on {self.describe().listen}")
                if on_ready:
                    on_ready()
                await self._stop.wait()
                notify("STOPPING=1", f"STATUS=waiting for {len(self.jobs.live)} migrations")
                self.log.info("stopping", migrations=len(self.jobs.live))
                await self.jobs.stop(self.settings.limits.stop_grace_s)
        finally:
            self.store.close()
        self.log.info("stopped")

    async def _serve(self, stack: AsyncExitStack, recovery: Recovery, doubts: Doubts) -> None:
        stack.push_async_callback(self.launcher.stop)
        self.launcher.start()
        stack.push_async_callback(self.vtpms.close)
        self.vtpms.prepare(vm for vm, _source in self.registry.definitions().values())
        stack.push_async_callback(self.quoting.stop)
        self.quoting.start()
        await self.listener.start()
        stack.push_async_callback(self.listener.stop)
        stack.push_async_callback(self.pairing.stop)
        stack.push_async_callback(self.office.stop)
        server = _ApiServer(
            uvicorn.Config(
                create_app(self),
                lifespan="off",
                http=CallerProtocol,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=API_GRACE_S,
            )
        )
        sock = _bind(self.paths.agent_socket)
        stack.callback(self.paths.agent_socket.unlink, missing_ok=True)
        recovering = asyncio.create_task(self._recover(recovery), name="recovery")
        stack.push_async_callback(_cancelled, recovering)
        stack.push_async_callback(_cancelled, asyncio.create_task(doubts.run(), name="doubts"))
        stack.push_async_callback(_cancelled, asyncio.create_task(self._keep_logs_short(), name="logs"))
        stack.push_async_callback(_cancelled, asyncio.create_task(self.fleet.keep(), name="fleet"))
        serving = asyncio.create_task(server.serve(sockets=[sock]), name="api")
        serving.add_done_callback(lambda _task: self.stop())
        stack.push_async_callback(_ended, server, serving)

    async def _recover(self, recovery: Recovery) -> None:
        """Settle what a previous agent left, and then what jobs leave; their VMs are held meanwhile."""
        while True:
            try:
                if not recovery.is_done:
                    await recovery.recover()
                await self.vtpms.settle_all()
            except Exception:  # the next attempt may do better, and nothing else would make it
                self.log.exception("recovery failed")
            await asyncio.sleep(RECOVERY_INTERVAL_S)

    async def _keep_logs_short(self) -> None:
        while True:
            for log in (self.paths.state / "log").glob("*.log"):
                trim_log(log)
            await asyncio.sleep(QEMU_LOG_INTERVAL_S)

    def _rejoin(self, migration: Migration) -> Job:
        """Go on with a source's postcopy whose halves are parted, and which no job runs."""
        return self.jobs.take_up(migration.id, lambda held: RejoiningSource(self, held))

    def _find_qmp(self, vm: str) -> str | None:
        with contextlib.suppress(SealaneError):
            return self.registry.get(vm).qmp
        return None


class _Facts:
    """What the metrics look up in an agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    @property
    def under_way(self) -> list[Migration]:
        return self._agent.jobs.under_way

    @property
    def queue_length(self) -> int:
        return self._agent.jobs.queue.waiting_count

    @property
    def total_rate_max(self) -> int:
        return self._agent.rates.total_bytes_per_s

    @property
    def peers_count(self) -> int:
        return len(self._agent.peers.list())

    @property
    def last_receipt(self) -> int:
        return self._agent.store.receipt_head()[0]

    @property
    def not_after(self) -> datetime:
        return self._agent.identity.not_after


class _ApiServer(uvicorn.Server):
    """Uvicorn without its own signal handlers; the agent decides when to end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait([task])


async def _ended(server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    server.should_exit = True
    await serving


def _bind(path: Path) -> socket.socket:
    """The REST socket, never open to others: its directory is 0700 and it is born with mode 0660.

    The lock is ours, so whatever lies there is stale.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o117)
    try:
        path.unlink(missing_ok=True)
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise make_error("host.permission", f"{path}: {error.strerror or error}") from error
    finally:
        os.umask(before)
    return sock
