"""swtpm: which one is here, and one process of it with its key and its only control channel passed by descriptor.

0.7.1 reads keys at its start and writes its files itself, whole and by a rename. Without a listening socket nobody but who
started it can ask it for its state.
"""

import contextlib
import os
import re
import socket
import struct
import subprocess
from pathlib import Path
from typing import Final

from sealane.errors import make_error
from sealane.vtpm.control import BlobType, Command, ControlChannel

STATE_FILE: Final = "tpm2-00.permall"
LEAST_VERSION: Final = (0, 7, 0)
# A guest's command may be under way, and making an RSA key takes a while.
ANSWER_TIMEOUT_S: Final = 30.0
_TOOL_TIMEOUT_S: Final = 60.0
_EK_HANDLE: Final = 0x81010001
_STARTUP_CLEAR: Final = bytes.fromhex("80010000000c000001440000")


def parse_version(text: str) -> tuple[int, int, int] | None:
    """The version in the words of `swtpm --version`."""
    found = re.search(r"\bversion (\d{1,4})\.(\d{1,4})\.(\d{1,4})", text[:1000])
    return None if found is None else (int(found[1]), int(found[2]), int(found[3]))


def version() -> tuple[int, int, int]:
    """The version of the swtpm here; raises `vtpm.swtpm` where there is none, or one that is too old."""
    try:
        said = subprocess.run(
            ["swtpm", "--version"], capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False
        ).stdout
    except FileNotFoundError:
        raise make_error("vtpm.swtpm", "swtpm is not installed", mend="install Debian's swtpm") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise make_error("vtpm.swtpm", f"swtpm --version: {type(error).__name__}") from error
    found = parse_version(said)
    if found is None or found < LEAST_VERSION:
        raise make_error("vtpm.swtpm", f"swtpm says {said.strip()[:80]!r}; 0.7.0 is the oldest that will do")
    return found


class Swtpm:
    """One process, its state in `directory`, encrypted under `key` (none: in clear). `stop` it; it dies with us too.

    `migration_key` is swtpm's own protection of the state that it gives out, which Sealane does not use: for comparisons.
    """

    def __init__(self, directory: Path, key: bytes | None, *, migration_key: bytes | None = None) -> None:
        ours, theirs = socket.socketpair()
        words = [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={directory},mode=0600"),
            *("--ctrl", f"type=unixio,clientfd={theirs.fileno()}"),
        ]
        passed = [theirs.fileno()]
        try:
            for option, secret in (("--key", key), ("--migration-key", migration_key)):
                if secret is not None:
                    passed.append(_pipe_with(secret))
                    words += [option, f"fd={passed[-1]},format=binary,mode=aes-256-cbc"]
            self.process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "--", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # whoever started us waits for the end of ours
                pass_fds=passed,
            )
        except OSError as error:
            ours.close()
            raise make_error("vtpm.swtpm", f"swtpm could not be started: {error.strerror}") from error
        finally:
            theirs.close()
            for descriptor in passed[1:]:
                os.close(descriptor)
        self.directory = directory
        self.control = ControlChannel(ours, ANSWER_TIMEOUT_S)

    @property
    def state_path(self) -> Path:
        """Where it keeps what outlasts it."""
        return self.directory / STATE_FILE

    def endorsement_key(self) -> bytes | None:
        """The public area of the key at 0x81010001, where there is one; starts the TPM up, so only in one for looking."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(ANSWER_TIMEOUT_S)
            self.control.command(Command.SET_DATAFD, descriptors=[theirs.fileno()])
            try:
                ours.sendall(_STARTUP_CLEAR)
                ours.recv(4096)
                ours.sendall(struct.pack(">HIII", 0x8001, 14, 0x173, _EK_HANDLE))
                answer = ours.recv(4096)
            except OSError as error:
                raise make_error("vtpm.swtpm", f"the TPM did not answer: {error}") from error
        if len(answer) < 12 or int.from_bytes(answer[6:10], "big"):
            return None
        return answer[12 : 12 + int.from_bytes(answer[10:12], "big")]

    def stop(self) -> None:
        """End it and wait for its end."""
        if self.process.poll() is None:
            with contextlib.suppress(Exception):
                self.control.command(Command.SHUTDOWN)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2.0)
            self.process.kill()
        self.process.wait()
        self.control.close()


def _pipe_with(secret: bytes) -> int:
    """The reading end of a pipe that holds the secret and nothing more."""
    reading, writing = os.pipe()
    os.write(writing, secret)
    os.close(writing)
    return reading


def read_state(content: bytes, key: bytes | None, scratch: Path) -> tuple[bytes, bytes | None]:
    """The permanent state in a state file's bytes, in clear, and the TPM's endorsement key; `scratch` is empty and private.

    Raises `vtpm.swtpm` where swtpm does not take them.
    """
    (scratch / STATE_FILE).write_bytes(content)
    reader = Swtpm(scratch, key)
    try:
        reader.control.start()
        return reader.control.tpm_state_read(BlobType.PERMANENT), reader.endorsement_key()
    finally:
        reader.stop()


def manufacture(scratch: Path) -> bytes:
    """The state file of a new TPM with an endorsement key, in clear; raises `vtpm.swtpm`."""
    words = ["swtpm_setup", "--tpm2", "--tpmstate", str(scratch), "--createek", "--pcr-banks", "sha256"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise make_error("vtpm.swtpm", "swtpm_setup is not installed", mend="install Debian's swtpm-tools") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise make_error("vtpm.swtpm", f"swtpm_setup: {type(error).__name__}") from error
    if done.returncode:
        raise make_error("vtpm.swtpm", f"swtpm_setup: {(done.stdout + done.stderr).strip()[-300:]}")
    return (scratch / STATE_FILE).read_bytes()
