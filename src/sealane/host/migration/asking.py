"""A source in doubt asks the destination, over a channel of its own, with its own enclave and both ends attested.

The question names migration, VM and epoch, and so does the answer. The channel's id is a fresh one: nothing of an earlier
channel can be heard in it.
"""

import asyncio
import contextlib
import secrets

from sealane.enclave.interface import Begin, SendMessage
from sealane.errors import ControlError, InternalError, PeerError, SealaneError, for_peer, make_error
from sealane.host.migration import messages
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.dialling import dial_peer, give_up_when_unanswered
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.migration.receipt_exchange import COPY_TIMEOUT_S
from sealane.host.models import Migration, Peer
from sealane.host.store import JournalEntry, utc_now
from sealane.hypervisor.qmp import QmpMachine
from sealane.libvirt.domains import is_domain
from sealane.limits import ASK_ANSWER_TIMEOUT_S, DEFAULT_PORT, HANDSHAKE_TIMEOUT_S, QMP_TIMEOUT_S


async def ask_peer(context: MigrationContext, entry: JournalEntry) -> tuple[messages.Answer, str | None]:
    """What the destination's journal says of a migration in doubt, and the digest of its receipt, if it came along.

    Raises what keeps the peer from being asked: `trust.unknown`, `peer.unreachable`, `attest.*`, `peer.slow` …
    """
    migration = entry.migration
    peer = _peer_of(context, migration)
    enclave = await context.launcher.start_enclave()
    try:
        await _meet(context, enclave, peer, entry)
        answer = await _put(enclave, migration)
        digest = await _receipt(context, enclave, migration) if isinstance(answer, messages.Ran) else None
        enclave.finish()
    except BaseException as error:
        enclave.abort(for_peer(error) if isinstance(error, SealaneError) else InternalError("internal.error"))
        raise
    else:
        return answer, digest
    finally:
        await uninterrupted(enclave.reap())


def _peer_of(context: MigrationContext, migration: Migration) -> Peer:
    peer = context.peers.get(migration.peer)
    # a fleet's host is known by the name that its CA vouches for, and may have renewed its certificate
    if context.peers.is_trusted(peer) and peer.fingerprint != migration.peer_fingerprint:
        words = f"{peer.name} has another certificate now than the host that the ticket was given to"
        raise PeerError("peer.unknown", words)
    if peer.address is None:
        raise ControlError("trust.no-address", f"{peer.name} has no address")
    return peer


async def _meet(context: MigrationContext, enclave: EnclaveProcess, peer: Peer, entry: JournalEntry) -> None:
    migration = entry.migration
    assert peer.address is not None  # noqa: S101 - `_peer_of` looked
    binaries = await _qemu_binaries(entry)
    connection = await dial_peer(peer.address, peer.port or DEFAULT_PORT, context.settings.congestion_control)
    give_up_when_unanswered(connection)
    try:
        quoting = context.quoting.connect(enclave.pid, binaries)
    except BaseException:
        connection.close()
        raise
    enclave.call(
        Begin(
            role="source",
            migration=secrets.token_hex(16),
            key_pem=context.identity.key_pem.decode(),
            certificate_pem=context.identity.certificate_pem.decode(),
            trusted={peer.fingerprint: peer.name} if context.peers.is_trusted(peer) else {},
            protection=migration.protection,
            now=utc_now().isoformat(),
            vm=migration.vm,
            epoch=_epoch(migration),
            reattest_every_s=context.settings.attestation.again_every_s,
            **context.membership.introduction(peer.name),
        ),
        connection,
        quoting,
    )
    await enclave.wait(enclave.established, HANDSHAKE_TIMEOUT_S, "peer.slow", "handshake")


async def _put(enclave: EnclaveProcess, migration: Migration) -> messages.Answer:
    about = {"migration": migration.id, "vm": migration.vm, "epoch": _epoch(migration)}
    enclave.call(SendMessage(messages.Ask.model_validate(about).model_dump_json()))
    said = await enclave.next_message(ASK_ANSWER_TIMEOUT_S, "answer from the peer")
    if not isinstance(said, messages.Ran | messages.Promise | messages.Unsettled):
        raise PeerError("peer.message", f"`{said.kind}` came instead of an answer")
    if {"migration": said.migration, "vm": said.vm, "epoch": said.epoch} != about:
        raise PeerError("peer.message", "the answer is about another ticket than the question")
    return said


async def _receipt(context: MigrationContext, enclave: EnclaveProcess, migration: Migration) -> str | None:
    """The destination's signed receipt, where it gives one that holds; the answer stands without it."""
    with contextlib.suppress(SealaneError):
        copy = await enclave.expect(messages.ReceiptCopy, COPY_TIMEOUT_S)
        completed = migration.model_copy(update={"state": "completed"})
        return context.receipts.keep_peers(completed, copy.envelope.encode(), copy.certificate.encode())
    return None


async def _qemu_binaries(entry: JournalEntry) -> list[str]:
    """The paused QEMU's program, for the evidence; none where it is gone."""
    if entry.qmp is None or is_domain(entry.qmp):
        return []
    with contextlib.suppress(SealaneError, asyncio.TimeoutError):
        async with QmpMachine.connect(entry.qmp, QMP_TIMEOUT_S) as qemu:
            return [f"/proc/{qemu.pid}/exe"] if qemu.pid else []
    return []


def _epoch(migration: Migration) -> int:
    if migration.epoch is None:
        raise make_error("handover.in-doubt", "the journal does not say which epoch the ticket had")
    return migration.epoch
