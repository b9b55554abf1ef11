"""libvirt's own migration, driven by the agent as its client, over two connections that the agent stands between."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sealane.errors import SealaneError
from sealane.libvirt import binding
from sealane.libvirt.disks import CopyStorage
from sealane.libvirt.domains import DomainAddress
from sealane.libvirt.rpcfilter import MigrateFlag

_COPY_FLAGS: Final[Mapping[CopyStorage, int]] = {
    "none": 0,
    "all": MigrateFlag.NON_SHARED_DISK,
    "inc": MigrateFlag.NON_SHARED_INC,
}


@dataclass(frozen=True)
class MigrationWishes:
    """What libvirt is asked for; 0 leaves libvirt's own choice."""

    migrate_uri: str
    channels: int = 0
    max_bandwidth_mib_per_s: int = 0
    auto_converge: bool = False
    persistent: bool = False
    undefine_source: bool = False
    copy_storage: CopyStorage = "none"
    disks_uri: str = ""

    @property
    def flags(self) -> int:
        """virDomainMigrateFlags: always live, and always paused at the destination."""
        return (
            MigrateFlag.LIVE
            | MigrateFlag.PAUSED
            | (MigrateFlag.PARALLEL if self.channels else 0)
            | (MigrateFlag.AUTO_CONVERGE if self.auto_converge else 0)
            | (MigrateFlag.PERSIST_DEST if self.persistent else 0)
            | (MigrateFlag.UNDEFINE_SOURCE if self.undefine_source else 0)
            | _COPY_FLAGS[self.copy_storage]
        )

    @property
    def parameters(self) -> dict[str, str | int]:
        """The typed parameters of virDomainMigrate3."""
        given: dict[str, str | int] = {"migrate_uri": self.migrate_uri}
        if self.channels:
            given["parallel.connections"] = self.channels
        if self.max_bandwidth_mib_per_s:
            given["bandwidth"] = self.max_bandwidth_mib_per_s
        if self.disks_uri:
            given["disks_uri"] = self.disks_uri
        return given


def start_client(address: DomainAddress, source: Path, destination: Path, wishes: MigrationWishes) -> "ClientThread":
    """Begin to migrate; `source` and `destination` are sockets that lead to the two libvirtd."""
    thread = ClientThread(address, source, destination, wishes)
    thread.start()
    return thread


class ClientThread(threading.Thread):
    """virDomainMigrate3 in a thread of its own; it ends by itself once its connections are closed."""

    def __init__(self, address: DomainAddress, source: Path, destination: Path, wishes: MigrationWishes) -> None:
        super().__init__(name="libvirt migration", daemon=True)
        self._address, self._wishes = address, wishes
        self._sockets = (source, destination)
        self.failure: SealaneError | None = None

    def run(self) -> None:
        """Migrate; what went wrong is in `failure` afterwards."""
        libvirt = binding.load()
        open_here = []
        try:
            for socket in self._sockets:
                path = self._address.uri.removeprefix("qemu://")
                open_here.append(libvirt.open(f"qemu+unix://{path}?socket={socket}"))
            source, destination = open_here
            domain = source.lookupByUUIDString(str(self._address.uuid))
            domain.migrate3(destination, self._wishes.parameters, self._wishes.flags)
        except libvirt.libvirtError as error:
            self.failure = binding.failure(error)
        finally:
            for connection in open_here:
                try:
                    connection.close()
                except libvirt.libvirtError:
                    continue
