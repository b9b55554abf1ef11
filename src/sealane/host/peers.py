"""Which hosts are trusted, by the fingerprint of their certificate."""

from sealane.errors import make_error
from sealane.host.models import Peer
from sealane.host.store import Store


class Peers:
    """The trust list, kept in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def list(self) -> list[Peer]:
        """All peers, by name."""
        return self._store.peers()

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

    def get(self, name: str) -> Peer:
        """The peer of that name; raises `trust.unknown`."""
        for peer in self._store.peers():
            if peer.name == name:
                return peer
        raise make_error("trust.unknown", f"no peer is called {name}")

    def by_fingerprint(self, fingerprint: str) -> Peer | None:
        """The peer with that fingerprint, if it is trusted."""
        return next((peer for peer in self._store.peers() if peer.fingerprint == fingerprint), None)
