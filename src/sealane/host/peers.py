"""Which hosts are trusted, by the fingerprint of their certificate."""

from collections.abc import Callable

from sealane.errors import make_error
from sealane.host.models import Peer
from sealane.host.store import Store


class Peers:
    """The trust list, kept in the store."""

    def __init__(self, store: Store, fleet: Callable[[], list[Peer]] = list) -> None:
        """`fleet` are the hosts that a CA vouches for: found by name, and behind those that are trusted by themselves."""
        self._store, self._fleet = store, fleet
        self.on_remove: Callable[[str], None] = lambda name: None

    def check(self, peer: Peer) -> Peer:
        """The peer as `add` would keep it; raises what `add` raises, and changes nothing."""
        for known in self._store.peers():
            if known.name == peer.name and known.fingerprint != peer.fingerprint:
                raise make_error("trust.exists", f"{peer.name} is trusted with {known.fingerprint}")
            if known.name != peer.name and known.fingerprint == peer.fingerprint:
                raise make_error("trust.exists", f"that fingerprint is trusted as {known.name} already")
            if known.name == peer.name:
                address, port = peer.address or known.address, peer.port or known.port
                peer = peer.model_copy(update={"address": address, "port": port})
        return peer

    def add(self, peer: Peer) -> Peer:
        """Trust a host. Again with the same fingerprint: a new address or port is taken over, an absent one kept.

        Raises `trust.exists` when the name has another fingerprint or the fingerprint another name.
        """
        peer = self.check(peer)
        self._store.put_peer(peer)
        return peer

    def remove(self, name: str) -> None:
        """Trust a host no longer; raises `trust.unknown`."""
        if not self._store.remove_peer(name):
            raise make_error("trust.unknown", f"no peer is called {name}")
        self.on_remove(name)

    def everyone(self) -> list[Peer]:
        """All peers and the fleet's other hosts, by name."""
        known = self._store.peers()
        names = {peer.name for peer in known}
        return sorted([*known, *(peer for peer in self._fleet() if peer.name not in names)], key=lambda peer: peer.name)

    def list(self) -> list[Peer]:
        """All that are trusted by themselves, by name."""
        return self._store.peers()

    def is_trusted(self, peer: Peer) -> bool:
        """Whether the peer is trusted by itself, and not by a CA's word alone."""
        return self.by_fingerprint(peer.fingerprint) is not None

    def get(self, name: str) -> Peer:
        """The peer, or the fleet's host, of that name; raises `trust.unknown`."""
        for peer in self.everyone():
            if peer.name == name:
                return peer
        raise make_error("trust.unknown", f"no peer is called {name}")

    def by_fingerprint(self, fingerprint: str) -> Peer | None:
        """The peer with that fingerprint, if it is trusted."""
        return next((peer for peer in self._store.peers() if peer.fingerprint == fingerprint), None)
