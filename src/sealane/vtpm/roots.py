"""What the key of a vTPM's files is wrapped to, and the counter that tells an old copy from the present one.

With a TPM in the host, the key is sealed in it under the policy that an NV counter of this VM has one value, and the counter
goes on with each launch, rotation and departure: what was sealed before can never be opened again, whatever copies there are.
Without one, the key lies in a file of the agent's state directory and the counter in the record beside it: whoever can put
that directory back can put the TPM back too.
"""

import base64
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final, Protocol

from sealane.errors import make_error
from sealane.vtpm.record import KeyReference, write_whole

_TOOL_TIMEOUT_S: Final = 30.0
# TPM 2.0: 0x01800000-0x01bfffff are the owner's NV indices.
_FIRST_INDEX: Final = 0x0185EA00
_INDICES: Final = 256


class Root(Protocol):
    """Keeps one VM's key and counter."""

    words: str

    def counter(self, reference: KeyReference) -> int | None:
        """The value that the counter has now; None where only the record knows."""

    def prepare(self, reference: KeyReference) -> KeyReference:
        """A reference for a new key, which does not count yet: what `wrap` fills. `reference` names the VM's counter, if any."""

    def wrap(self, key: bytes, reference: KeyReference) -> KeyReference:
        """Keep the key for the reference's counter value."""

    def unwrap(self, reference: KeyReference) -> bytes:
        """The key; raises `vtpm.key-gone` where it cannot be had any more."""

    def advance(self, reference: KeyReference) -> None:
        """Let the counter reach the reference's value, which ends every key of lower values."""

    def destroy(self, reference: KeyReference) -> None:
        """Make the key, and all before it, unusable for good; harmless when done twice."""

    def discard(self, reference: KeyReference) -> None:
        """Forget a key that never counted, or that a later one has replaced."""


class FileRoot:
    """Keys in files of the agent's state directory."""

    words = "a key file of the agent's (no host TPM): whoever copies the state directory has the key"

    def __init__(self, directory: Path, vm: str) -> None:
        self._directory, self._vm = directory, vm

    def _path(self, reference: KeyReference) -> Path:
        return self._directory / f"{self._vm}.{reference.counter}.key"

    def counter(self, reference: KeyReference) -> int | None:
        """None: the record is the counter."""
        return None

    def prepare(self, reference: KeyReference) -> KeyReference:
        """The next value."""
        return KeyReference(root="file", counter=reference.counter + 1)

    def wrap(self, key: bytes, reference: KeyReference) -> KeyReference:
        """Write the key's file."""
        write_whole(self._path(reference), key)
        return reference

    def unwrap(self, reference: KeyReference) -> bytes:
        """Read it."""
        try:
            return self._path(reference).read_bytes()
        except OSError:
            raise make_error("vtpm.key-gone", f"there is no key {reference.counter} of {self._vm} any more") from None

    def advance(self, reference: KeyReference) -> None:
        """Nothing to do: the record was written."""

    def discard(self, reference: KeyReference) -> None:
        """Each key has a file."""
        _overwrite(self._path(reference))

    def destroy(self, reference: KeyReference) -> None:
        """Every key of the VM's: one that was written and never counted on is not left either."""
        ours = re.compile(re.escape(self._vm) + r"\.\d+\.key")
        for path in self._directory.glob("*.key"):
            if ours.fullmatch(path.name):
                _overwrite(path)


def _overwrite(path: Path) -> None:
    """Overwrite the file, then remove it; what the disk keeps of it underneath is not in our hands."""
    with contextlib.suppress(FileNotFoundError):
        with open(path, "r+b") as file:
            file.write(bytes(os.fstat(file.fileno()).st_size))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()


class TpmRoot:
    """Keys sealed in the host's TPM by tpm2-tools, each for one value of the VM's NV counter; raises `vtpm.root`."""

    words = "sealed in the host's TPM, under a counter of its own"

    def __init__(self, tcti: str, scratch: Path) -> None:
        self._tcti, self._scratch = tcti or "device:/dev/tpmrm0", scratch

    def counter(self, reference: KeyReference) -> int | None:
        """The NV counter's value."""
        return self._read(reference.index)

    def prepare(self, reference: KeyReference) -> KeyReference:
        """One more than the counter has; a new counter where the VM has none."""
        if reference.index:
            return KeyReference(root="tpm", index=reference.index, counter=self._read(reference.index) + 1)
        taken = self._tool("tpm2_getcap", "handles-nv-index").decode().lower()
        free = (at for at in range(_FIRST_INDEX, _FIRST_INDEX + _INDICES) if f"{at:#x}" not in taken)
        try:
            index = next(free)
        except StopIteration:
            raise make_error("vtpm.root", "the host's TPM has a counter for 256 VMs already") from None
        self._tool("tpm2_nvdefine", f"{index:#x}", "-C", "o", "-s", "8", "-a", "nt=counter|ownerread|ownerwrite")
        self._tool("tpm2_nvincrement", f"{index:#x}", "-C", "o")
        return KeyReference(root="tpm", index=index, counter=self._read(index) + 1)

    def wrap(self, key: bytes, reference: KeyReference) -> KeyReference:
        """Seal the key for the counter's coming value."""
        with self._directory() as directory:
            secret = directory / "key"
            secret.write_bytes(key)
            self._policy(directory, reference, trial=True)
            self._primary(directory)
            self._tool(
                "tpm2_create", "-C", directory / "primary", "-L", directory / "policy", "-i", secret,
                "-u", directory / "public", "-r", directory / "private", "-a", "fixedtpm|fixedparent",
            )  # fmt: skip
            self._flush()
            secret.write_bytes(bytes(len(key)))
            sealed = {
                name: base64.b64encode((directory / name).read_bytes()).decode() for name in ("public", "private")
            }
        return replace(reference, public=sealed["public"], private=sealed["private"])

    def unwrap(self, reference: KeyReference) -> bytes:
        """Have the TPM open it, which it does only while the counter has the value."""
        if self._read(reference.index) != reference.counter:
            raise make_error("vtpm.key-gone", "the host's TPM has counted on since this key was sealed")
        with self._directory() as directory:
            for name, text in (("public", reference.public), ("private", reference.private)):
                (directory / name).write_bytes(base64.b64decode(text))
            self._primary(directory)
            self._tool(
                "tpm2_load", "-C", directory / "primary", "-u", directory / "public", "-r", directory / "private",
                "-c", directory / "object",
            )  # fmt: skip
            self._flush()
            self._policy(directory, reference, trial=False)
            try:
                return self._tool("tpm2_unseal", "-c", directory / "object", "-p", f"session:{directory / 'session'}")
            finally:
                self._tool("tpm2_flushcontext", directory / "session")
                self._flush()

    def advance(self, reference: KeyReference) -> None:
        """Increment the counter until it has the value."""
        if self._read(reference.index) < reference.counter:
            self._tool("tpm2_nvincrement", f"{reference.index:#x}", "-C", "o")

    def discard(self, reference: KeyReference) -> None:
        """Nothing to do: the counter has not reached it, or is beyond it."""

    def destroy(self, reference: KeyReference) -> None:
        """Count beyond the key's value: the TPM itself will not open it again."""
        if not reference.index:  # no counter yet, and so no key
            return
        while self._read(reference.index) <= reference.counter:
            self._tool("tpm2_nvincrement", f"{reference.index:#x}", "-C", "o")

    def _read(self, index: int) -> int:
        return int.from_bytes(self._tool("tpm2_nvread", f"{index:#x}", "-C", "o"), "big")

    def _primary(self, directory: Path) -> None:
        self._tool("tpm2_createprimary", "-C", "o", "-G", "ecc", "-g", "sha256", "-c", directory / "primary")
        self._flush()

    def _policy(self, directory: Path, reference: KeyReference, *, trial: bool) -> None:
        """The policy "this counter has this value", as a digest (trial) or as an open session."""
        session, value = directory / "session", directory / "value"
        value.write_bytes(reference.counter.to_bytes(8, "big"))
        kind: list[str] = [] if trial else ["--policy-session"]
        self._tool("tpm2_startauthsession", "-S", session, *kind)
        words: list[str | Path] = ["-L", directory / "policy"] if trial else []
        self._tool("tpm2_policynv", "-S", session, "-C", "o", "-i", value, f"{reference.index:#x}", "eq", *words)
        if trial:
            self._tool("tpm2_flushcontext", session)

    def _flush(self) -> None:
        self._tool("tpm2_flushcontext", "-t")

    @contextlib.contextmanager
    def _directory(self) -> Iterator[Path]:
        self._scratch.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._scratch) as name:
            yield Path(name)

    def _tool(self, *words: str | Path) -> bytes:
        try:
            done = subprocess.run(
                [str(word) for word in words],
                env={**os.environ, "TPM2TOOLS_TCTI": self._tcti, "TSS2_LOG": "all+NONE"},
                capture_output=True,
                timeout=_TOOL_TIMEOUT_S,
                check=False,
            )
        except FileNotFoundError:
            raise make_error("vtpm.root", f"{words[0]} is missing", mend="install Debian's tpm2-tools") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise make_error("vtpm.root", f"{words[0]}: {type(error).__name__}") from error
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
            raise make_error("vtpm.root", f"{words[0]} at {self._tcti}: {said}")
        return done.stdout
