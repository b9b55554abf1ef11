"""Private directories for a vault, and a host TPM that is one more swtpm."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sealane.testing.hosts import make_hosts
from sealane.testing.hosttpm import boot_with_tpm
from sealane.vtpm.record import Records
from sealane.vtpm.vault import Vault

MakeVault = Callable[..., Vault]


@pytest.fixture
def make_vault(tmp_path: Path) -> MakeVault:
    def make(vm: str = "web01", *, tcti: str | None = None) -> Vault:
        return Vault(
            Records(tmp_path / "records"), vm, storage=tmp_path / "files", scratch=tmp_path / "scratch", tcti=tcti
        )

    return make


@pytest.fixture(scope="session")
def host_tpm() -> Iterator[str]:
    """The TCTI of a host's TPM."""
    with make_hosts(["host-a"], network="loopback") as hosts:
        yield boot_with_tpm(hosts[0], []).tcti
