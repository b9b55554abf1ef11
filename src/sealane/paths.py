"""Where Sealane keeps its state, its sockets and its configuration; each movable by one environment variable."""

import os
import site
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STATE_VARIABLE = "SEALANE_STATE_DIR"
RUN_VARIABLE = "SEALANE_RUN_DIR"
CONFIG_VARIABLE = "SEALANE_CONFIG_DIR"


# How the interpreters are started that hold keys, or measure. What they run is modules, which are measured, and nothing else:
# no variables and no user's directory (-I); no `.pth` files, `sitecustomize` or `usercustomize`, which run code at each start
# (-S); of Python's caches of compiled modules none is read or written (nothing can lie below a device file).
ISOLATED: Final = ("-I", "-S", "-B", "-X", "pycache_prefix=/dev/null/none")
_LIBRARIES: Final = frozenset({"site-packages", "dist-packages"})
_RUN_MODULE: Final = "import runpy; del sys.argv[0]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"


def import_path() -> list[str]:
    """Where such an interpreter finds Sealane and its libraries, which `site` does not tell it."""
    own = str(Path(__file__).resolve().parents[1])
    libraries = [entry for entry in sys.path if os.path.basename(entry) in _LIBRARIES and entry != site.USER_SITE]
    return list(dict.fromkeys([own, *libraries]))


def isolated(code: str, *arguments: object) -> list[str]:
    """The words that run this code in such an interpreter."""
    return [sys.executable, *ISOLATED, "-c", f"import sys; sys.path += {import_path()!r}; {code}", *map(str, arguments)]


def isolated_module(module: str, *arguments: object) -> list[str]:
    """The words that run a module as `python -m` does, in such an interpreter."""
    return isolated(_RUN_MODULE, module, *arguments)


@dataclass(frozen=True)
class Paths:
    """The three directories of one host (FHS 3.0: 5.8 /var/lib, 3.15 /run, 3.7 /etc)."""

    state: Path
    run: Path
    config: Path

    @classmethod
    def from_environment(cls) -> "Paths":
        """The directories that the environment names, or else the system's."""
        return cls(
            state=Path(os.environ.get(STATE_VARIABLE, "/var/lib/sealane")),
            run=Path(os.environ.get(RUN_VARIABLE, "/run/sealane")),
            config=Path(os.environ.get(CONFIG_VARIABLE, "/etc/sealane")),
        )

    @property
    def agent_socket(self) -> Path:
        """The agent's REST socket."""
        return self.run / "agent.sock"

    @property
    def database(self) -> Path:
        """The journal, the peers and the VMs (SQLite)."""
        return self.state / "sealane.db"

    @property
    def identity_key(self) -> Path:
        """The host's Ed25519 private key (PEM, PKCS#8, mode 0600)."""
        return self.state / "identity.key"

    @property
    def identity_certificate(self) -> Path:
        """The host's self-signed certificate (PEM)."""
        return self.state / "identity.crt"

    @property
    def authority(self) -> Path:
        """On a CA's host: its key, its certificate, and what it knows of the fleet."""
        return self.state / "ca"

    @property
    def membership(self) -> Path:
        """On a host of a fleet: the CA's certificate and list, this host's certificate, the other hosts."""
        return self.state / "fleet"

    def environment(self) -> dict[str, str]:
        """The variables that point another process at the same directories."""
        return {
            STATE_VARIABLE: str(self.state),
            RUN_VARIABLE: str(self.run),
            CONFIG_VARIABLE: str(self.config),
        }
