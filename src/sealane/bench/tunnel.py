"""An ssh tunnel between two simulated hosts: Debian's own OpenSSH, server and client, on a private port with keys made for it.

It leads from a unix socket at the source to a TCP port at the destination, as people carry a migration through ssh. It stands
before anything is measured. The packages are unpacked into the cache: nothing is installed, no server of this machine is touched.
"""

import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from sealane.testing import packages
from sealane.testing.hosts import BackgroundProcess, SimulatedHost
from sealane.testing.problems import RigError

_PORT: Final = 48302
_NOBODY: Final = 65534
_SERVER, _CLIENT, _KEYGEN = "usr/sbin/sshd", "usr/bin/ssh", "usr/bin/ssh-keygen"
_LIBRARIES: Final = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_TOOL_TIMEOUT_S: Final = 30.0


class SshTunnel:
    """From `source` to `port` at `destination`'s address. A context manager; `uri` is what the source's QEMU is told."""

    def __init__(self, source: SimulatedHost, destination: SimulatedHost, port: int) -> None:
        self._source, self._destination, self._target = source, destination, f"{destination.address}:{port}"
        self._socket = source.scratch / f"ssh-to-{destination.name}.sock"
        # a server without root's rights runs as whoever may log in; its files lie where that user reaches them
        self._user = "nobody" if os.geteuid() == 0 else getpass.getuser()
        self._directory = Path(tempfile.mkdtemp(prefix="sl-ssh-", dir="/tmp"))
        self._processes: list[BackgroundProcess] = []
        self.cipher = self.version = ""
        self.setup_ms = 0.0

    @property
    def uri(self) -> str:
        """Where the tunnel begins, for QEMU's `migrate`."""
        return f"unix:{self._socket}"

    def __enter__(self) -> "SshTunnel":
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in reversed(self._processes):
            process.stop(timeout_s=3.0)
        self._socket.unlink(missing_ok=True)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self) -> None:
        root = packages.unpacked("openssh", ["openssh-server", "openssh-client"])
        self._directory.chmod(0o755)
        libraries = self._missing_libraries(root)
        port = _PORT if self._destination.namespace is not None else _free_port(self._destination.address)
        self._make_keys(root, port)
        server = self._directory / "sshd"
        shutil.copy(root / _SERVER, server)
        as_user = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--pdeathsig", "KILL"]
        listening = self._destination.start(
            *(as_user if self._user == "nobody" else []),
            *("env", f"LD_LIBRARY_PATH={libraries}", server, "-D", "-e", "-f", self._config(port)),
        )
        self._processes.append(listening)
        listening.wait_for("Server listening on")
        began = time.monotonic()
        client = self._source.start("env", f"LD_LIBRARY_PATH={libraries}", root / _CLIENT, *self._client_words(port))
        self._processes.append(client)
        client.wait_for("Entering interactive session")
        client.wait_until(self._socket.exists, "its socket")
        self.setup_ms = round((time.monotonic() - began) * 1e3, 1)
        self.cipher = _found(r"kex: client->server cipher: (\S+)", client.output)
        self.version = _found(r"^(OpenSSH_\S+)", client.output)

    def _missing_libraries(self, root: Path) -> str:
        """A directory with those of the package's libraries that this machine lacks."""
        into = self._directory / "lib"
        into.mkdir()
        told = "".join(_run("ldd", root / name) for name in (_SERVER, _CLIENT, _KEYGEN))
        for name in set(re.findall(r"^\s+(\S+) => not found", told, re.MULTILINE)):
            found = [root / place / name for place in _LIBRARIES if (root / place / name).exists()]
            if not found:
                raise RigError(f"OpenSSH needs {name}, which is not here")
            shutil.copy(found[0], into / name)
        return str(into)

    def _make_keys(self, root: Path, port: int) -> None:
        environment = os.environ | {"LD_LIBRARY_PATH": str(self._directory / "lib")}
        for name in ("host", "user"):
            _run(
                *(root / _KEYGEN, "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", self._directory / name),
                environment=environment,
            )
        key = (self._directory / "host.pub").read_text()
        (self._directory / "known").write_text(f"[{self._destination.address}]:{port} {key}")
        if self._user == "nobody":
            os.chown(self._directory / "host", _NOBODY, _NOBODY)

    def _config(self, port: int) -> Path:
        path = self._directory / "config"
        lines = {
            "ListenAddress": f"{self._destination.address}:{port}",
            "HostKey": self._directory / "host",
            "AuthorizedKeysFile": self._directory / "user.pub",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "yes",  # without it, a user without a password counts as locked
            "AuthenticationMethods": "publickey",
            "AllowUsers": self._user,
            "AllowTcpForwarding": "local",
            "PermitOpen": self._target,
            "PermitTTY": "no",
            "X11Forwarding": "no",
        }
        path.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        return path

    def _client_words(self, port: int) -> Sequence[str | Path]:
        options = {
            "IdentityFile": self._directory / "user",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self._directory / "known",
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "ExitOnForwardFailure": "yes",
            "Port": port,
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        forward = f"{self._socket}:{self._target}"
        return ["-v", "-F", "none", "-N", "-T", *words, "-L", forward, f"{self._user}@{self._destination.address}"]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    return match[1] if match else "not told"


def _free_port(address: str) -> int:
    with socket.create_server((address, 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _run(*argv: str | Path, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in argv],
        capture_output=True,
        text=True,
        env=environment,
        timeout=_TOOL_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RigError(f"{argv[0]}: {done.stdout}{done.stderr}")
    return done.stdout
