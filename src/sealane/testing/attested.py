"""Two hosts that attest with a software TPM each, and know each other's values: what pairing does for real hosts.

The policy that they get accepts this test root by name; the default refuses it.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sealane.quoting.manifest import digest_file
from sealane.testing.hosts import SimulatedHost
from sealane.testing.hosttpm import HostTpm, boot_with_tpm
from sealane.testing.problems import RigError

LEVEL: Final = 3
_MEASURED_TIMEOUT_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.05
_REFERENCE: Final = "reference-values.json"


class AttestedHosts:
    """Boots each host with a TPM; `settings` goes into its `agent.toml`, `introduce` follows when the agents run."""

    def __init__(self, qemus: Sequence[Path], *, again_every_s: float = 600.0) -> None:
        self._qemus, self._again_every_s = list(qemus), again_every_s
        self._tpms: dict[str, HostTpm] = {}

    def settings(self, host: SimulatedHost) -> str:
        """Boot this host; the text for its settings. Raises RigError."""
        tpm = self._tpms[host.name] = boot_with_tpm(host, self._qemus)
        lines = [
            "[attestation]",
            tpm.settings().rstrip("\n"),
            f"least_level = {LEVEL}",
            f"again_every_s = {self._again_every_s}",
            'accepted_test_roots = ["software-tpm"]',
            f'reference_values = "{host.paths.config / _REFERENCE}"',
        ]
        return "\n".join(lines) + "\n"

    def introduce(self, hosts: Sequence[SimulatedHost]) -> None:
        """Give each host the other's values; waits until both have measured. Raises RigError."""
        for host, peer in (hosts, hosts[::-1]):
            values = self.values_of(peer)
            (host.paths.config / _REFERENCE).write_text(json.dumps(values))

    def tcti(self, host: SimulatedHost) -> str:
        """Where the host's TPM is, for tests that meddle with it."""
        return self._tpms[host.name].tcti

    def values_of(self, host: SimulatedHost) -> dict[str, Any]:
        """The reference values that vouch for this host."""
        path, deadline = host.paths.run / _REFERENCE, time.monotonic() + _MEASURED_TIMEOUT_S
        while not (path.exists() and path.read_text().endswith("}\n")):
            if time.monotonic() > deadline:
                raise RigError(f"{host.name} did not measure itself")
            time.sleep(_LOOK_EVERY_S)
        values: dict[str, Any] = json.loads(path.read_text())
        tpm = self._tpms[host.name]
        if values.get("hosts") != [f"ak:{tpm.key}"]:
            raise RigError(f"{host.name} has another attestation key than its TPM has proved")
        values["tpm"]["keys"][0]["name"] = host.name
        values["platform"]["qemu"] = [digest_file(path) for path in self._qemus]
        return {
            **values,
            "peers": {host.name: values["hosts"]},
            "ima": {"digests": tpm.files},
            "accept_test_roots": True,
        }
