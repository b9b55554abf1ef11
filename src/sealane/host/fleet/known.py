"""Keeps `known-hosts.json`: of paired hosts what they showed, of the fleet's hosts what the CA says they showed."""

from sealane.attest.known import KNOWN_HOSTS, KnownHost, KnownHosts, parse_known
from sealane.host.fleet.files import read_if_there, write_whole
from sealane.paths import Paths
from sealane.session.renewal import HostEntry


class KnownHostsFile:
    """The file; the agent alone writes it. Raises HostError."""

    def __init__(self, paths: Paths) -> None:
        self._path = paths.state / KNOWN_HOSTS

    def read(self) -> KnownHosts:
        """What is there."""
        return parse_known(read_if_there(self._path))

    def note_paired(self, name: str, shown: KnownHost | None) -> None:
        """What a host showed in a pairing; None forgets it."""
        known = self.read()
        paired = {other: kept for other, kept in known.paired.items() if other != name}
        self._write(known.model_copy(update={"paired": paired | ({} if shown is None else {name: shown})}))

    def note_fleet(self, hosts: list[HostEntry]) -> None:
        """The fleet's hosts, as the CA has them now."""
        fleet = {
            host.name: KnownHost(reference=host.reference, hardware_keys=host.hardware_keys)
            for host in hosts
            if host.reference
        }
        self._write(self.read().model_copy(update={"fleet": fleet}))

    def _write(self, known: KnownHosts) -> None:
        content = known.model_dump_json().encode()
        if content != read_if_there(self._path):
            write_whole(self._path, content)
