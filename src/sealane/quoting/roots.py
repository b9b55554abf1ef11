"""Which roots of trust a host would show, in words, without making a key or a quote: for `sealane init` and `sealane doctor`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sealane.errors import HostError
from sealane.quoting.drivers.configfs import REPORTS
from sealane.quoting.drivers.sev_snp import SevSnpDriver
from sealane.quoting.drivers.sgx import SgxDriver
from sealane.quoting.drivers.simulated import SimulatedDriver
from sealane.quoting.drivers.software import SoftwareDriver
from sealane.quoting.drivers.tdx import TdxDriver
from sealane.quoting.drivers.tpm2 import HARDWARE_TPM, SOFTWARE_TPM, USUAL_TCTI, looks_like_software
from sealane.quoting.interface import DriverName

_PATIENCE_S: Final = 5.0
Worth = Literal["identity", "simulated", "hardware"]


@dataclass(frozen=True)
class Root:
    """One root of trust. `worth` is what it counts at most; `problem` says why it would not answer, and is empty where it would."""

    driver: DriverName
    words: str
    worth: Worth
    problem: str = ""

    @property
    def sentence(self) -> str:
        """The words; a simulation says so, and what does not answer too."""
        simulated = ", SIMULATED: for tests only" if self.worth == "simulated" else ""
        return f"{self.words}{simulated}" + (f" (does not answer: {self.problem})" if self.problem else "")


@dataclass(frozen=True)
class Place:
    """Where roots of trust are, as the settings `attestation.*` have it; `system` is in front of the kernel's files."""

    tcti: str = ""
    simulated_root: str = ""
    system: Path = Path("/")


def describe_roots(drivers: Sequence[DriverName], place: Place) -> list[Root]:
    """Each driver that is set, in their order."""
    return [_DESCRIBERS[name](place) for name in drivers]


def _software(place: Place) -> Root:
    return Root("software", SoftwareDriver.words, "identity")


def _tpm2(place: Place) -> Root:
    tcti = place.tcti or USUAL_TCTI
    try:
        simulated = looks_like_software(tcti, timeout_s=_PATIENCE_S)
    except HostError as error:
        # which TPM it would be is not known, so nothing better than this may be said
        return Root("tpm2", f"{HARDWARE_TPM} at {tcti}", "hardware", error.detail)
    words = SOFTWARE_TPM if simulated else HARDWARE_TPM
    return Root("tpm2", f"{words} at {tcti}", "simulated" if simulated else "hardware")


def _simulated(place: Place) -> Root:
    found = place.simulated_root and (Path(place.simulated_root) / "key.pem").is_file()
    problem = "" if found else f"`attestation.simulated_root` ({place.simulated_root or 'not set'}) has no key.pem"
    return Root("simulated", SimulatedDriver.words, "simulated", problem)


def _sgx(place: Place) -> Root:
    return _by_file("sgx", SgxDriver.words, place.system / "dev/attestation/attestation_type")


def _tdx(place: Place) -> Root:
    return _by_file("tdx", TdxDriver.words, place.system / REPORTS)


def _sev_snp(place: Place) -> Root:
    return _by_file("sev-snp", SevSnpDriver.words, place.system / REPORTS)


def _by_file(driver: DriverName, words: str, path: Path) -> Root:
    return Root(driver, words, "hardware", "" if path.exists() else f"{path} is not there")


_DESCRIBERS: Final[Mapping[DriverName, Callable[[Place], Root]]] = {
    "software": _software,
    "tpm2": _tpm2,
    "simulated": _simulated,
    "sgx": _sgx,
    "tdx": _tdx,
    "sev-snp": _sev_snp,
}
