"""How an enclave begins, at either end: the peer's connection, this host's identity, and a line to the quoting process."""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sealane.enclave.interface import Begin
from sealane.host.migration.context import MigrationContext
from sealane.host.migration.enclave_process import EnclaveProcess


@dataclass(frozen=True)
class Beginning:
    """Which migration it is, and whom the enclave may meet.

    `migration` is its id, `trusted` maps fingerprints to names, `protection` is one name at the source and all that are allowed,
    with blanks between, at the destination; `now` is ISO 8601. VM, its epoch, and the name that the peer must have are
    the source's to say.
    """

    role: Literal["source", "destination"]
    migration: str
    trusted: dict[str, str]
    protection: str
    now: str
    vm: str = ""
    epoch: int = 0
    peer: str = ""

    def begin(
        self, context: MigrationContext, enclave: EnclaveProcess, connection: socket.socket, binaries: Sequence[str]
    ) -> None:
        """Have the enclave meet whom the connection leads to; its evidence covers these binaries of QEMU.

        The connection is closed where this fails; raises what the quoting process and the enclave's socket do.
        """
        try:
            quoting = context.quoting.connect(enclave.pid, binaries)
        except BaseException:
            connection.close()
            raise
        call = Begin(
            role=self.role,
            migration=self.migration,
            key_pem=context.identity.key_pem.decode(),
            certificate_pem=context.identity.certificate_pem.decode(),
            trusted=self.trusted,
            protection=self.protection,
            now=self.now,
            vm=self.vm,
            epoch=self.epoch,
            reattest_every_s=context.settings.attestation.again_every_s,
            **context.membership.introduction(self.peer),
        )
        enclave.call(call, connection, quoting)
