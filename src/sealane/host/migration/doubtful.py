"""A destination that is asked by a source in doubt: the question checked, the journal's answer given."""

import asyncio
from typing import Any, Final

import structlog

from sealane.enclave.interface import PeerEstablished, SendMessage
from sealane.errors import make_error
from sealane.host.answering import Asker, answer
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.enclave_process import EnclaveProcess, uninterrupted
from sealane.host.migration.messages import Ask, Ran
from sealane.host.migration.receipt_exchange import copy_of

# The source closes when it has heard.
_GOODBYE_WAIT_S: Final = 5.0


async def answer_doubt(context: MigrationContext, enclave: EnclaveProcess, met: PeerEstablished, ask: Ask) -> None:
    """Answer, and see to the enclave's end. Raises `attest.migration`, the store's errors: then nothing was said."""
    if (ask.vm, ask.epoch) != (met.vm, met.epoch):
        raise make_error("attest.migration", f"the peer attested for {met.vm} and asks about another VM or epoch")
    is_pinned = context.peers.by_fingerprint(met.peer_fingerprint) is not None
    asker = Asker(met.peer_fingerprint, None if is_pinned else met.peer_name)
    said, found = answer(context.jobs, context.store, ask, asker)
    log = structlog.get_logger().bind(migration=ask.migration[:8], vm=ask.vm, peer=met.peer_name)
    log.info("asked what became of a migration", answer=said.kind)
    enclave.call(SendMessage(said.model_dump_json()))
    if isinstance(said, Ran) and found is not None and (copy := copy_of(found, context.receipts)) is not None:
        enclave.call(SendMessage(copy.model_dump_json()))
    over: set[asyncio.Future[Any]] = {enclave.finished, enclave.failed}
    await asyncio.wait(over, timeout=_GOODBYE_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
    enclave.finish()
    await uninterrupted(enclave.reap())
