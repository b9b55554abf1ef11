"""One error root, and its families.

Every failure that a user, a peer or a caller of the REST interface can meet has a stable code. The catalogue
(`sealane.error_codes`) gives each code its family; the family gives the exit status and the HTTP status:

    SealaneError
    ├── UsageError      2  400  the caller asked for something that cannot be
    ├── EvidenceError   2  422  evidence, or what belongs to it, cannot be understood
    ├── PeerError       3  502  the peer is hostile, broken, unknown or gone (detail never goes back to it)
    │   └── AttestationRejected  4  403  the peer's evidence is not what this host wants of it
    ├── HostError       5  500  this host cannot: disk, memory, permissions, QEMU
    ├── ControlError    6  409  not in this state: not found, conflict, refused, cancelled
    ├── InDoubtError    7  409  the VM is paused and may run elsewhere; a person may have to decide
    └── InternalError  70  500  our own fault

Exit status 0 is success; 1 is left to the interpreter's own failures.
"""

from collections.abc import Mapping
from typing import ClassVar

from sealane.error_codes import FAMILIES, Entry


class SealaneError(Exception):
    """Root of all errors that Sealane raises on purpose.

    `code` stands in CATALOGUE, `detail` is one line in plain words, `mend` says what to do (the catalogue's by default).
    Whatever the detail quotes, of a peer, of QEMU or of a file, it is fit for a terminal, a log and the journal.
    """

    exit_status: ClassVar[int] = 70
    http_status: ClassVar[int] = 500

    def __init__(self, code: str, detail: str = "", *, mend: str | None = None) -> None:
        entry = CATALOGUE[code]
        self.code = code
        self.detail = _printable(" ".join((detail or entry.summary).split()))
        self.mend = entry.mend if mend is None else mend
        self.retryable = entry.retryable
        super().__init__(f"{self.detail} [{code}]")

    def as_dict(self) -> dict[str, str | bool]:
        """The error as it crosses the REST interface and the channel."""
        return {"code": self.code, "detail": self.detail, "mend": self.mend, "retryable": self.retryable}


class UsageError(SealaneError):
    """The caller asked for something that cannot be."""

    exit_status = 2
    http_status = 400


class EvidenceError(SealaneError):
    """Evidence, or what belongs to it, cannot be understood."""

    exit_status = 2
    http_status = 422


class PeerError(SealaneError):
    """The peer is hostile, broken, unknown or gone."""

    exit_status = 3
    http_status = 502


class AttestationRejected(PeerError):
    """The peer's evidence is not what this host wants of it; no page was sent."""

    exit_status = 4
    http_status = 403


class WireError(PeerError):
    """A peer's QEMU sent bytes that are no migration stream: at `offset` of its connection, inside `section`."""

    def __init__(
        self, code: str, detail: str = "", *, mend: str | None = None, offset: int = 0, section: str = ""
    ) -> None:
        place = f"at offset {offset}{f' in {section}' if section else ''}"
        super().__init__(code, f"{detail or CATALOGUE[code].summary} ({place})", mend=mend)
        self.offset = offset
        self.section = section


class HostError(SealaneError):
    """This host cannot do it: disk, memory, permissions, QEMU."""

    exit_status = 5


class ControlError(SealaneError):
    """Not possible in the present state: not found, conflict, refused, cancelled."""

    exit_status = 6
    http_status = 409


class InDoubtError(SealaneError):
    """The ticket left and no receipt came: the VM is paused here and may run there."""

    exit_status = 7
    http_status = 409


class InternalError(SealaneError):
    """Our own fault."""


CATALOGUE: Mapping[str, Entry] = {code: entry for codes in FAMILIES.values() for code, entry in codes.items()}
_CLASS_OF: Mapping[str, type[SealaneError]] = {
    each.__name__: each
    for each in (
        UsageError,
        EvidenceError,
        PeerError,
        AttestationRejected,
        HostError,
        ControlError,
        InDoubtError,
        InternalError,
    )
}
_FAMILY_OF: Mapping[str, type[SealaneError]] = {
    code: _CLASS_OF[family] for family, codes in FAMILIES.items() for code in codes
}


def printable(text: str, limit: int = 500) -> str:
    """Somebody else's words made fit for a terminal and a log: bounded, and what is not printable replaced."""
    return _printable(text[:limit])


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)


def for_peer(error: SealaneError) -> SealaneError:
    """What another host is told of it: the code, and no path, log line or word of QEMU's of this host."""
    if not isinstance(error, HostError | InternalError):
        return error
    return make_error(error.code, f"{CATALOGUE[error.code].summary}; more stands in `sealane status` there")


def family_of(code: str) -> type[SealaneError]:
    """The class that errors of this code have; InternalError where the code is unknown (a newer peer's)."""
    return _FAMILY_OF.get(code, InternalError)


def make_error(code: str, detail: str = "", *, mend: str | None = None) -> SealaneError:
    """An error of the class that the catalogue gives this code; unknown codes become `internal.error`."""
    if code not in CATALOGUE:
        return InternalError("internal.error", f"{code}: {detail}")
    return family_of(code)(code, detail, mend=mend)
