"""The files that say what this host expects of peers, read and checked before anything rests on them.

They are checked when the agent starts, by `sealane doctor`, and again for each migration, since they may be changed at any time.
A file that cannot be used refuses every peer; what an error says begins with the file, and names the line where there is one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sealane.attest.appraise import Material
from sealane.attest.known import KNOWN_HOSTS, parse_known
from sealane.attest.reading import EVIDENCE_BYTES_MAX
from sealane.attest.reference import Reference, parse_reference
from sealane.crypto.chains import CertificateMalformed, parse_certificates
from sealane.crypto.signatures import KeyMalformed, parse_public_key
from sealane.errors import EvidenceError, HostError, SealaneError


@dataclass(frozen=True)
class ExpectedFiles:
    """Which files there are, as the settings `attestation.*` name them; empty is none."""

    reference_values: str = ""
    reference_key: str = ""
    collateral: Sequence[str] = ()
    tpm_roots: Sequence[str] = ()


@dataclass(frozen=True)
class Checked:
    """One file: what it holds, in words, or why it cannot be used."""

    setting: str
    path: str
    words: str = ""
    problem: SealaneError | None = None

    @property
    def is_missing(self) -> bool:
        """Whether nothing is there, as before the first reference values came."""
        return self.problem is not None and not Path(self.path).exists()


def check_files(files: ExpectedFiles, state: Path) -> Iterator[Checked]:
    """Look at every file that is set, and at what this host keeps of hosts that were paired or enrolled."""
    if files.reference_values:
        yield _checked("reference_values", files.reference_values, partial(_reference_words, files))
    elif files.reference_key:
        yield _checked("reference_key", files.reference_key, partial(_key_words, files.reference_key))
    for path in files.collateral:
        yield _checked("collateral", path, partial(_collateral_words, path))
    for path in files.tpm_roots:
        yield _checked("tpm_roots", path, partial(_roots_words, path))
    known = state / KNOWN_HOSTS
    if known.exists():
        yield _checked("known hosts", str(known), partial(_known_words, known))


def read_expected(path: str) -> bytes:
    """The bytes of such a file; raises HostError `host.permission`, EvidenceError `attest.too-large`."""
    try:
        with open(path, "rb") as file:
            content = file.read(EVIDENCE_BYTES_MAX + 1)
    except OSError as error:
        raise HostError("host.permission", f"{path}: {error.strerror}") from error
    if len(content) > EVIDENCE_BYTES_MAX:
        raise EvidenceError("attest.too-large", f"{path}: more than {EVIDENCE_BYTES_MAX} bytes")
    return content


def check_reference(path: str, content: bytes, key_path: str, key: bytes | None) -> Reference:
    """Syntax and signature of a reference file; raises EvidenceError `attest.reference`, `attest.reference-signature`."""
    if key is not None:
        try:
            parse_public_key(key)
        except KeyMalformed as error:
            raise EvidenceError("attest.reference-signature", f"{key_path}: {error}") from error
    try:
        return parse_reference(content, key=key)
    except EvidenceError as error:
        raise EvidenceError(error.code, f"{path}: {error.detail}") from error


def _checked(setting: str, path: str, look: Callable[[], str]) -> Checked:
    try:
        return Checked(setting, path, look())
    except SealaneError as error:
        return Checked(setting, path, problem=error)


def _reference_words(files: ExpectedFiles) -> str:
    key = read_expected(files.reference_key) if files.reference_key else None
    found = check_reference(files.reference_values, read_expected(files.reference_values), files.reference_key, key)
    signed = "not signed" if key is None else f"signed under {files.reference_key}"
    keys = [] if found.tpm is None else found.tpm.keys
    software = sum(one.root == "software" for one in keys)
    simulated = f", {software} of them software TPMs" if software else ""
    return f"{signed}; {len(keys)} keys of TPMs{simulated}, {len(found.test_roots)} test roots"


def _key_words(path: str) -> str:
    read_expected(path)
    raise EvidenceError(
        "attest.reference-signature", f"{path}: a key is set, and no reference_values that it would sign"
    )


def _collateral_words(path: str) -> str:
    return Material().add(path, read_expected(path))


def _roots_words(path: str) -> str:
    try:
        return f"{len(parse_certificates(read_expected(path)))} certificates"
    except CertificateMalformed as error:
        raise EvidenceError("attest.malformed", f"{path}: {error}") from error


def _known_words(path: Path) -> str:
    known = parse_known(read_expected(str(path)))
    for name, host in [*known.paired.items(), *known.fleet.items()]:
        try:
            host.parsed()
        except EvidenceError as error:
            raise HostError("host.store", f"{path}: {name}: {error.detail}") from error
    return f"{len(known.paired)} paired, {len(known.fleet)} of the fleet"
