"""After the hand-over each end gives the other its signed receipt, so that neither story can be changed alone.

    destination   resumed, Receipt sent, its own receipt written  --- ReceiptCopy --->  source
    source        keeps it, writes its own, which names its digest  --- ReceiptCopy --->  destination

All of it comes after the VM runs at the destination. Whatever fails here costs the copy and nothing else.
"""

from typing import Final

from sealane.enclave.interface import SendMessage
from sealane.errors import PeerError, SealaneError
from sealane.host.job import Job
from sealane.host.migration import messages
from sealane.host.migration.enclave_process import EnclaveProcess
from sealane.host.models import Migration
from sealane.host.receipts.chain import Receipts

# The other end has only to sign and to write a file.
COPY_TIMEOUT_S: Final = 5.0


def give_copy(job: Job, enclave: EnclaveProcess, receipts: Receipts) -> None:
    """Send the other end our receipt of this migration, if it was written and fits a message."""
    copy = copy_of(job.migration, receipts)
    if copy is None:
        return
    try:
        enclave.call(SendMessage(copy.model_dump_json()))
    except SealaneError as error:
        job.log.info("the other end did not get our receipt", code=error.code)


def copy_of(migration: Migration, receipts: Receipts) -> messages.ReceiptCopy | None:
    """Our receipt of this migration, if it was written and fits a message."""
    data = receipts.read(migration)
    if data is None or len(data) > messages.RECEIPT_COPY_MAX:
        return None
    return messages.ReceiptCopy(envelope=data.decode(), certificate=receipts.certificate_pem.decode())


async def take_copy(job: Job, enclave: EnclaveProcess, receipts: Receipts) -> str | None:
    """Keep the other end's receipt; its digest, or None where none came that holds."""
    try:
        copy = await enclave.expect(messages.ReceiptCopy, COPY_TIMEOUT_S)
        return receipts.keep_peers(job.migration, copy.envelope.encode(), copy.certificate.encode())
    except PeerError as error:
        job.log.warning("no receipt of the other end", code=error.code, detail=error.detail)
    except SealaneError as error:
        job.log.error("the other end's receipt was not kept", code=error.code, detail=error.detail)
    return None
