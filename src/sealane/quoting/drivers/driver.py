"""What a root of trust does for the quoting process."""

from collections.abc import Sequence
from typing import Protocol


class Driver(Protocol):
    """One root of trust. Every method raises HostError `quoting.driver` where it does not do what is asked."""

    words: str
    """What it is, for people; simulated and software roots say so here."""

    def resume_log(self, lines: Sequence[bytes]) -> int:
        """How many of these lines it has extended already; 0 for a root that extends nothing, as all are signed anew."""

    def extend(self, line: bytes) -> None:
        """Extend the log's register by one line; nothing where there is no register."""

    def quote(self, user_data: bytes, log: bytes) -> dict[str, bytes]:
        """Evidence over user data of at most 64 bytes, and over the platform log where it signs that itself; by piece."""
