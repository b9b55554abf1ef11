"""The roots of trust, one file each; `make_drivers` in the order in which they are set."""

from collections.abc import Callable, Mapping
from typing import Final

from sealane.quoting.drivers.driver import Driver
from sealane.quoting.drivers.sev_snp import SevSnpDriver
from sealane.quoting.drivers.sgx import SgxDriver
from sealane.quoting.drivers.simulated import SimulatedDriver
from sealane.quoting.drivers.software import SoftwareDriver
from sealane.quoting.drivers.tdx import TdxDriver
from sealane.quoting.drivers.tpm2 import Tpm2Driver
from sealane.quoting.interface import Configure, DriverName

_MAKERS: Final[Mapping[DriverName, Callable[[Configure], Driver]]] = {
    "software": SoftwareDriver,
    "tpm2": Tpm2Driver,
    "simulated": SimulatedDriver,
    "sgx": SgxDriver,
    "tdx": TdxDriver,
    "sev-snp": SevSnpDriver,
}


def make_drivers(configuration: Configure) -> list[Driver]:
    """A driver for each name that is set; each raises HostError `quoting.driver` where its root of trust is not there."""
    return [_MAKERS[name](configuration) for name in configuration.drivers]
