"""What this host knows of other hosts' hardware and software: what each showed when it was paired, or enrolled by the CA.

The agent keeps it as JSON in its state directory, and enclaves get it with the policy:

    {"version": 1, "paired": {"<name>": {"reference": "<reference values>", "hardware_keys": ["<digest>", …]}}, "fleet": {…}}
"""

from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sealane.attest.reference import Reference, parse_introduced
from sealane.errors import EvidenceError, HostError

# In the state directory.
KNOWN_HOSTS: Final = "known-hosts.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class KnownHost(_Strict):
    """One host. `hardware_keys` are attestation keys that this host, or the CA, has seen to be a hardware TPM's."""

    reference: Annotated[str, Field(max_length=64 * 1024)]
    hardware_keys: list[str] = []

    def parsed(self) -> Reference:
        """As the judge takes it; raises EvidenceError."""
        return parse_introduced(self.reference.encode(), hardware_keys=frozenset(self.hardware_keys))


class KnownHosts(_Strict):
    """All of them. A host that was paired goes before one of the same name in the fleet."""

    version: Literal[1] = 1
    paired: dict[str, KnownHost] = {}
    fleet: dict[str, KnownHost] = {}

    def introduced(self, name: str) -> Reference | None:
        """What that host showed; None where it showed nothing. Raises EvidenceError."""
        found = self.paired.get(name) or self.fleet.get(name)
        return None if found is None else found.parsed()

    def hardware_of(self, name: str) -> list[str]:
        """The hardware that the host showed when it was introduced; for people."""
        try:
            found = self.introduced(name)
        except EvidenceError:
            return []
        return [] if found is None else list(found.hosts or ())


def parse_known(data: bytes) -> KnownHosts:
    """Read the file; empty is nothing. Raises HostError `host.store`: what cannot be read must not mean that nothing is known."""
    try:
        return KnownHosts.model_validate_json(data) if data else KnownHosts()
    except ValidationError as error:
        raise HostError("host.store", f"{KNOWN_HOSTS}: {error.error_count()} fields do not fit") from error
