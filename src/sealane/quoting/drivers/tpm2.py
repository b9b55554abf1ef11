"""A TPM 2.0, through tpm2-tools: a hardware TPM at `/dev/tpmrm0`, or any that a TCTI reaches, swtpm included.

The attestation key is a restricted signing key on P-256 under the RSA endorsement key, made once and kept in the TPM at a
handle of its own. That it lives in the same TPM as the endorsement key another host can have proved: `activate` (TPM 2.0
Library, part 1, 24). Quotes cover the PCRs of boot and IMA and that of Sealane's log; the log's PCR is one that only a restart
sets back.
"""

import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sealane.errors import HostError
from sealane.quoting.interface import Configure

BANK: Final = "sha256"
_BOOT_AND_IMA: Final = tuple(range(11))
# TCG's provisioning guidance: 0x81010001 is the RSA endorsement key's; 0x81010000-0x8101ffff is the owner's of such keys.
_EK_HANDLE: Final = "0x81010001"
_AK_HANDLE: Final = "0x81015ea1"
# TCG EK Credential Profile, 2.2.1.4: the certificate of the RSA 2048 endorsement key.
_EK_CERTIFICATE_NV: Final = "0x01c00002"
_TOOL_TIMEOUT_S: Final = 30.0
_DIGEST_BYTES: Final = 32
USUAL_TCTI: Final = "device:/dev/tpmrm0"
SOFTWARE_TPM: Final = "software TPM (swtpm or alike)"
HARDWARE_TPM: Final = "TPM 2.0"
# TPM commands extend one digest each; a command line holds some hundred.
_EXTENDS_AT_ONCE: Final = 100


class Tpm2Driver:
    """One TPM. Raises HostError `quoting.driver` with what the tool said, and `quoting.pcr`."""

    def __init__(self, configuration: Configure) -> None:
        self._tcti = configuration.tcti or USUAL_TCTI
        self._pcr = configuration.pcr
        self._directory = Path(configuration.run)
        self._pcrs = sorted({*_BOOT_AND_IMA, self._pcr})
        self.is_software = looks_like_software(self._tcti)
        self.words = SOFTWARE_TPM if self.is_software else HARDWARE_TPM
        self._make_keys()
        self.public = self._output("tpm2_readpublic", "-c", _AK_HANDLE, out="-o")

    def resume_log(self, lines: Sequence[bytes]) -> int:
        """How many lines the PCR has; a line may have been kept just before a crash, before it was extended."""
        wanted = self._values([self._pcr])[self._pcr]
        value = bytes(_DIGEST_BYTES)
        counts = {value: 0}
        for count, line in enumerate(lines, 1):
            value = hashlib.sha256(value + hashlib.sha256(line).digest()).digest()
            counts[value] = count
        if wanted not in counts:
            raise HostError("quoting.pcr", f"PCR {self._pcr} has a value that Sealane's log does not explain")
        return counts[wanted]

    def extend(self, line: bytes) -> None:
        """PCR_Extend by the line's SHA-256."""
        self._tool("tpm2_pcrextend", f"{self._pcr}:{BANK}={hashlib.sha256(line).hexdigest()}")

    def extend_all(self, steps: Sequence[tuple[int, bytes]]) -> None:
        """Extend PCRs by digests, as firmware and kernel do; for simulated boots."""
        words = [f"{pcr}:{BANK}={digest.hex()}" for pcr, digest in steps]
        for at in range(0, len(words), _EXTENDS_AT_ONCE):
            self._tool("tpm2_pcrextend", *words[at : at + _EXTENDS_AT_ONCE])

    def quote(self, user_data: bytes, log: bytes) -> dict[str, bytes]:
        """TPMS_ATTEST, its signature, the key, and the values of the quoted PCRs."""
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            files = {name: Path(directory) / name for name in ("quote", "signature", "values")}
            selection = f"{BANK}:{','.join(map(str, self._pcrs))}"
            self._tool(
                "tpm2_quote", "-c", _AK_HANDLE, "-l", selection, "-q", user_data.hex(), "-g", BANK,
                "-m", files["quote"], "-s", files["signature"], "-o", files["values"], "-F", "values",
            )  # fmt: skip
            found = {name: path.read_bytes() for name, path in files.items()}
        values = _cut(found["values"], self._pcrs)
        told = {str(pcr): value.hex() for pcr, value in values.items()}
        return {
            "tpm.quote": found["quote"],
            "tpm.signature": found["signature"],
            "tpm.key": self.public,
            "tpm.pcrs": json.dumps({"pcrs": {BANK: told}}).encode(),
        }

    def boot_values(self) -> dict[str, list[str]]:
        """The PCRs of the boot (0 to 9), as reference values have them."""
        return {str(pcr): [value.hex()] for pcr, value in self._values(range(10)).items()}

    def endorsement_key(self) -> bytes:
        """The public area of the endorsement key (TPM2B_PUBLIC)."""
        return self._output("tpm2_readpublic", "-c", _EK_HANDLE, out="-o")

    def ek_certificate(self) -> bytes:
        """What the TPM's maker issued for the RSA endorsement key (DER), from NV; empty where it was not provisioned."""
        try:
            content = self._output("tpm2_nvread", "-C", "o", _EK_CERTIFICATE_NV, out="-o")
        except HostError:
            return b""
        return _without_padding(content)

    def activate(self, credential: bytes) -> bytes:
        """The secret in a credential that was made for these two keys (see `quoting.enrolment`)."""
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            blob, session, secret = (Path(directory) / name for name in ("credential", "session", "secret"))
            blob.write_bytes(credential)
            self._tool("tpm2_startauthsession", "--policy-session", "-S", session)
            try:
                self._tool("tpm2_policysecret", "-S", session, "-c", "e")
                policy = f"session:{session}"
                self._tool(
                    "tpm2_activatecredential",
                    "-c",
                    _AK_HANDLE,
                    "-C",
                    _EK_HANDLE,
                    "-i",
                    blob,
                    "-o",
                    secret,
                    "-P",
                    policy,
                )
            finally:
                self._tool("tpm2_flushcontext", session)
            return secret.read_bytes()

    def _make_keys(self) -> None:
        handles = self._tool("tpm2_getcap", "handles-persistent").decode().lower()
        if _EK_HANDLE not in handles:
            self._tool("tpm2_createek", "-c", _EK_HANDLE, "-G", "rsa", "-u", os.devnull)
        if _AK_HANDLE in handles:
            return
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            context = Path(directory) / "ak"
            self._tool(
                "tpm2_createak", "-C", _EK_HANDLE, "-c", context, "-G", "ecc", "-g", BANK, "-s", "ecdsa",
                "-u", Path(directory) / "public", "-n", Path(directory) / "name",
            )  # fmt: skip
            self._tool("tpm2_flushcontext", "-t")
            self._tool("tpm2_evictcontrol", "-C", "o", "-c", context, _AK_HANDLE)
            self._tool("tpm2_flushcontext", "-t")

    def _values(self, pcrs: Sequence[int]) -> dict[int, bytes]:
        data = self._output("tpm2_pcrread", f"{BANK}:{','.join(map(str, pcrs))}", "-F", "values", out="-o")
        return _cut(data, pcrs)

    def _output(self, *words: str | Path, out: str) -> bytes:
        with tempfile.TemporaryDirectory(dir=self._directory) as directory:
            path = Path(directory) / "out"
            self._tool(*words, out, path)
            return path.read_bytes()

    def _tool(self, *words: str | Path) -> bytes:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _run_tool(self._tcti, *words)


def looks_like_software(tcti: str, *, timeout_s: float = _TOOL_TIMEOUT_S) -> bool:
    """libtpms and Microsoft's reference code say so in TPM2_PT_VENDOR_STRING. Raises HostError `quoting.driver`."""
    told = _run_tool(tcti, "tpm2_getcap", "properties-fixed", timeout_s=timeout_s)
    lines = told.decode(errors="replace").splitlines()
    vendor = [line.partition(":")[2].strip(' "') for at, line in enumerate(lines)
              if "VENDOR_STRING" in "".join(lines[max(0, at - 2) : at]) and "value" in line]  # fmt: skip
    words = "".join(vendor).replace(" ", "").upper()
    return "SWTPM" in words or "XCGFTPM" in words


def _run_tool(tcti: str, *words: str | Path, timeout_s: float = _TOOL_TIMEOUT_S) -> bytes:
    try:
        done = subprocess.run(
            [str(word) for word in words],
            env={**os.environ, "TPM2TOOLS_TCTI": tcti, "TSS2_LOG": "all+NONE"},
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise HostError("quoting.driver", f"{words[0]} is missing; install Debian's tpm2-tools") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError("quoting.driver", f"{words[0]}: {type(error).__name__}") from error
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise HostError("quoting.driver", f"{words[0]} at {tcti}: {said}")
    return done.stdout


def _without_padding(der: bytes) -> bytes:
    """Some makers fill the index up behind the certificate; its first four bytes tell its length (X.690, 8.1.3)."""
    if der[:2] != b"\x30\x82":
        return b""
    return der[: 4 + int.from_bytes(der[2:4], "big")]


def _cut(data: bytes, pcrs: Sequence[int]) -> dict[int, bytes]:
    if len(data) != _DIGEST_BYTES * len(pcrs):
        raise HostError("quoting.driver", f"{len(data)} bytes for {len(pcrs)} PCRs")
    return {pcr: data[_DIGEST_BYTES * at : _DIGEST_BYTES * (at + 1)] for at, pcr in enumerate(pcrs)}
