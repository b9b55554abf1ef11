"""A channel from its preface to the job that its peer asks for: a VM that comes, a postcopy that is joined again, or an answer.

    the enclave is started and meets the peer     (handshake, attestation)
    the peer says what it wants                   prepare, rejoin, ask
    a job begins, or is taken up                  the reception routes its lanes to the enclave from then on

A known peer's wish leaves a journal entry and a receipt, whatever refuses it.
"""

import socket
from collections.abc import Callable
from typing import Final, cast

from pydantic import TypeAdapter, ValidationError

from sealane.enclave.interface import AcceptLane, LaneTokens, PeerEstablished, PeerSeen, SendMessage
from sealane.errors import ControlError, InternalError, PeerError, SealaneError, for_peer, make_error
from sealane.host.job import Job
from sealane.host.migration import messages
from sealane.host.migration.beginning import Beginning
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.destination import DestinationMigration, channel_facts
from sealane.host.migration.domain_destination import DomainDestination
from sealane.host.migration.doubtful import answer_doubt
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.migration.postcopy_destination import Half
from sealane.host.migration.rejoining import taking_up
from sealane.host.models import Migration, Name, Protection, VmDefinition
from sealane.host.quoting import incoming_binaries
from sealane.host.store import JournalEntry, utc_now
from sealane.libvirt.domains import address_of
from sealane.limits import HANDSHAKE_TIMEOUT_S, PREPARE_TIMEOUT_S
from sealane.session.handover import IN_POSTCOPY

# What a migration is called here whose source ended it before it had said which VM it is.
UNNAMED: Final = "unnamed"
# And whom it is said to come from, where the enclave did not come to tell who that is.
UNPROVEN: Final = "unproven"
# Evidence that was not accepted, or not made.
_REFUSED_EVIDENCE: Final = ("attest.", "enclave.changed", "quoting.")
_NAME: Final[TypeAdapter[str]] = TypeAdapter(Name)


class Reception:
    """One channel from its preface to the VM that the peer names; afterwards it routes lanes to the enclave."""

    def __init__(
        self,
        context: MigrationContext,
        migration_id: str,
        admit: Callable[[str, str], None] = lambda fingerprint, name: None,
    ) -> None:
        """`admit` is given the fingerprint and name of a peer that proved itself, and raises where it has too much under way."""
        self._context, self._id = context, migration_id
        self._enclave: EnclaveProcess | None = None
        self._lanes_awaited: dict[bytes, int] = {}  # by token
        self._admit = admit
        self.peer_fingerprint: str | None = None

    @property
    def is_proven(self) -> bool:
        """Whether the peer has proved who it is."""
        return self.peer_fingerprint is not None

    @property
    def may_rejoin(self) -> bool:
        """Whether it became a postcopy, whose source may come back after a cut."""
        job = self._context.jobs.job(self._id)
        return isinstance(job, DestinationMigration) and job.may_rejoin

    async def meet(self, connection: socket.socket) -> Job | None:
        """Meet the peer and begin the job that it asks for, None where it only asked; raises SealaneError, having told the peer."""
        try:
            self._enclave = enclave = await self._context.launcher.start_enclave()
        except BaseException:
            connection.close()
            raise
        try:
            try:
                met = await self._handshake(enclave, connection)
            except SealaneError as error:
                self._note_unproven(enclave.seen, error)
                raise
            try:
                self._admit(met.peer_fingerprint, met.peer_name)
            except SealaneError as error:
                self._context.jobs.refusals.turned_away(error)
                raise
            self.peer_fingerprint = met.peer_fingerprint
            return await self._asked(enclave, met)
        except BaseException as error:
            await uninterrupted(_turn_away(enclave, error))
            raise

    async def _asked(self, enclave: EnclaveProcess, met: PeerEstablished) -> Job | None:
        """The job that the peer asks for; None where it is in doubt, and was answered.

        A known peer's wish leaves a journal entry and a receipt, whatever refuses it.
        """
        vm = _name_or(met.vm, UNNAMED)
        try:
            wish = await enclave.next_message(PREPARE_TIMEOUT_S, "word of what the peer wants")
            if isinstance(wish, messages.Ask):
                await answer_doubt(self._context, enclave, met, wish)
                return None
            if isinstance(wish, messages.Rejoin):
                return self._rejoined(enclave, met, wish)
            if not isinstance(wish, messages.Prepare):
                raise PeerError("peer.message", f"`{wish.kind}` came out of turn")
            vm = wish.vm
            await self._context.jobs.let_go(vm)
            return self._begin_job(enclave, met, wish)
        except SealaneError as error:
            facts = channel_facts(met)
            self._context.jobs.refusals.refuse(
                error, vm=vm, role="destination", peer=met.peer_name, id=self._id, **facts
            )
            raise

    def _rejoined(self, enclave: EnclaveProcess, met: PeerEstablished, wish: messages.Rejoin) -> Job:
        """The job whose postcopy was cut, and which this peer began; raises `migration.unknown` where there is none."""
        job = self._context.jobs.job(self._id)
        if (wish.vm, wish.epoch) == (met.vm, met.epoch):
            if isinstance(job, DestinationMigration):
                job.rejoin(met, wish, Half(enclave, self.expect_lanes))
                return job
            known = next(iter(self._context.store.find(self._id)), None)
            if job is None and known is not None and is_half_of(known.migration, met, wish):
                return self._taken_up(enclave, met, known)
        raise make_error("migration.unknown", "no postcopy of that VM waits here")

    def _taken_up(self, enclave: EnclaveProcess, met: PeerEstablished, entry: JournalEntry) -> Job:
        """An earlier agent's postcopy: go on with it, or say how it ended."""
        known = entry.migration
        if known.state in IN_POSTCOPY:
            make_job = taking_up(self._context, self.expect_lanes, enclave, met, entry.launched)
            return self._context.jobs.take_up(known.id, make_job)
        assert known.epoch is not None  # noqa: S101 - is_half_of compared it
        answer = (
            messages.Arrived(epoch=known.epoch, digest=None)
            if known.state == "completed"
            else messages.TicketRefused(code="handover.refused", detail="QEMU did not come through the switch")
        )
        enclave.call(SendMessage(answer.model_dump_json()))
        enclave.finish()
        raise make_error("migration.over", f"the source was told: {answer.kind}")

    def _note_unproven(self, seen: PeerSeen | None, error: SealaneError) -> None:
        """Evidence was refused, at either end: only a peer whose certificate is trusted comes so far. It leaves a receipt.

        The receipt names the peer by that certificate, the VM that it claims to send, and the verdict.
        """
        if not error.code.startswith(_REFUSED_EVIDENCE):
            return
        refuse, id = self._context.jobs.refusals.refuse, self._id
        if seen is None:
            refuse(error, vm=UNNAMED, role="destination", peer=UNPROVEN, id=id)
        else:
            vm = _name_or(seen.vm, UNNAMED)
            refuse(error, vm=vm, role="destination", peer=seen.peer_name, id=id, **channel_facts(seen))

    async def _handshake(self, enclave: EnclaveProcess, connection: socket.socket) -> PeerEstablished:
        try:
            trusted = await enclave.tell_trusted({peer.fingerprint: peer.name for peer in self._context.peers.list()})
            vms = self._context.registry.definitions().values()
            binaries = incoming_binaries(vm.launch_incoming for vm, _ in vms)
        except BaseException:
            connection.close()
            raise
        beginning = Beginning(
            role="destination",
            migration=self._id,
            trusted=trusted,
            protection=" ".join(sorted(self._context.settings.allowed_protections)),
            now=utc_now().isoformat(),
        )
        beginning.begin(self._context, enclave, connection, binaries)
        return await enclave.wait(enclave.established, HANDSHAKE_TIMEOUT_S, "peer.slow", "handshake")

    def _begin_job(self, enclave: EnclaveProcess, met: PeerEstablished, prepare: messages.Prepare) -> Job:
        if (prepare.vm, prepare.epoch) != (met.vm, met.epoch):
            raise make_error(
                "attest.migration", f"the peer attested for {met.vm} and wants to send another VM or epoch"
            )
        vm = self._known(prepare) if prepare.domain is None else incoming_domain(prepare, self._context)
        if not vm.launch_incoming and prepare.domain is None:
            raise ControlError("check.no-launch", f"{prepare.vm} has no launch command here")
        if (known := self._context.store.epoch(vm.name)) > prepare.epoch:
            words = f"{vm.name} would come with epoch {prepare.epoch + 1}, and {known} was here already"
            raise ControlError("handover.refused", words)
        kind = DestinationMigration if prepare.domain is None else DomainDestination
        return self._context.jobs.begin(
            lambda migration: kind(self._context, self.expect_lanes, enclave, met, prepare, vm, migration),
            vm=vm.name,
            role="destination",
            peer=met.peer_name,
            id=self._id,
            qmp=vm.qmp,
            protection=cast(Protection, met.protection),  # the enclave judged it by our own list
        )

    def _known(self, prepare: messages.Prepare) -> VmDefinition:
        try:
            return self._context.registry.get(prepare.vm)
        except SealaneError:
            raise ControlError("check.vm-unknown", f"this host knows no VM {prepare.vm}") from None

    def expect_lanes(self, tokens: LaneTokens) -> None:
        """From now on these lanes are let in, each once."""
        self._lanes_awaited = {bytes.fromhex(token): int(lane) for token, lane in tokens.lanes.items()}

    def accept_lane(self, token: bytes, lane: int, connection: socket.socket) -> bool:
        """Hand a lane's connection to the enclave; False where no lane with that token is awaited (the caller closes it).

        A stranger cannot guess a token, so what he sends ends here, and no migration hears of it.
        """
        if self._enclave is None or self._lanes_awaited.get(token) != lane:
            return False
        del self._lanes_awaited[token]
        try:
            self._enclave.call(AcceptLane(lane), connection)
        except SealaneError:
            return True
        return True


def incoming_domain(prepare: messages.Prepare, context: MigrationContext) -> VmDefinition:
    """The domain of libvirt that wants to come, as this host's policy sees it: what the source says of it, unless a VM of that
    name is known here. Raises `check.vm-unknown` where that one is no domain, or another one, and where this host looks at no
    domains of that URI.
    """
    assert prepare.domain is not None  # noqa: S101 - the caller looked
    address = address_of(prepare.uuid, prepare.domain.uri)
    if prepare.domain.uri not in context.settings.libvirt:
        raise make_error(
            "check.vm-unknown",
            f"{context.settings.name} takes no domains of {prepare.domain.uri}",
            mend="add the URI to `libvirt` in agent.toml there",
        )
    known = context.registry.definitions().get(prepare.vm)
    if known is None:
        wish = prepare.domain
        return VmDefinition(name=prepare.vm, qmp=address, least_level=wish.least_level, labels=wish.labels)
    if known[0].qmp != address:
        raise ControlError("check.vm-unknown", f"the VM that is called {prepare.vm} here is another one")
    return known[0]


def is_half_of(known: Migration, met: PeerEstablished, wish: messages.Rejoin) -> bool:
    """Whether this peer may ask for this migration's postcopy: the one that began it, the same VM and epoch.

    Of one that ended, only where it is certain what became of the VM.
    """
    if (known.role, known.peer_fingerprint) != ("destination", met.peer_fingerprint):
        return False
    is_certain = known.state in IN_POSTCOPY or known.ended_at is not None
    is_lost = known.state == "completed" and known.runs_at != "destination"
    return (known.vm, known.epoch) == (wish.vm, wish.epoch) and is_certain and not is_lost


async def _turn_away(enclave: EnclaveProcess, error: BaseException) -> None:
    enclave.abort(for_peer(error) if isinstance(error, SealaneError) else InternalError("internal.error"))
    await enclave.reap()


def _name_or(text: str, otherwise: str) -> str:
    """The name that a peer gave, if it can be a VM's: it becomes part of a file's name."""
    try:
        return _NAME.validate_python(text)
    except ValidationError:
        return otherwise
