"""What a migration needs of the agent that runs it."""

from typing import Final, Protocol

from sealane.crypto.aead import CIPHER_NAME
from sealane.crypto.identity import Identity
from sealane.host.config import Settings
from sealane.host.fleet.membership import Membership
from sealane.host.jobs import Jobs
from sealane.host.migration.enclave_launcher import EnclaveLauncher
from sealane.host.peers import Peers
from sealane.host.quoting import QuotingService
from sealane.host.rates import SharedRate
from sealane.host.receipts.chain import Receipts
from sealane.host.registry import Registry
from sealane.host.store import Store
from sealane.host.vtpm import Vtpms
from sealane.paths import Paths

LANE_CIPHER: Final = CIPHER_NAME


class MigrationContext(Protocol):
    """The agent, as its migrations see it."""

    paths: Paths
    settings: Settings
    identity: Identity
    store: Store
    jobs: Jobs
    peers: Peers
    registry: Registry
    receipts: Receipts
    launcher: EnclaveLauncher
    quoting: QuotingService
    vtpms: Vtpms
    membership: Membership
    rates: SharedRate
