"""What a keeper is started for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sealane.vtpm.record import Records
from sealane.vtpm.vault import Vault


@dataclass(frozen=True)
class Order:
    """What the agent starts a keeper with. `how`: create, adopt, open, reopen or receive; `tcti` null: the host has no TPM."""

    vm: str
    how: str
    epoch: int
    storage: str
    records: str
    scratch: str
    control_path: str
    admin_path: str
    tcti: str | None
    migration: str = ""
    version: int = 0
    ek_sha256: str = ""

    def vault(self) -> Vault:
        """The VM's vault."""
        return Vault(
            Records(Path(self.records)),
            self.vm,
            storage=Path(self.storage),
            scratch=Path(self.scratch),
            tcti=self.tcti,
        )

    def encode(self) -> bytes:
        """As it travels."""
        return json.dumps(asdict(self)).encode()
