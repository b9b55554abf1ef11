"""What a man in the middle does to bytes on their way. Each is called for every piece of every connection, and gives what goes on.

    tamper(connection, direction, offset, data) -> data

`direction` is "forward" (towards who was dialled) or "back"; `offset` is where in it the piece stands.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Direction: TypeAlias = Literal["forward", "back"]


@dataclass
class Replace:
    """Puts other bytes of the same length in place of chosen ones, wherever they come by, also where pieces cut them.

    So Xensploit changed a running guest's memory (Oberheide, Cooke and Jahanian, 2008). `hits` counts. A piece waits for the next
    only where it ends with at least `least` of the wanted bytes: one in 256 ends with the first of them by chance, and who
    waits for an answer to it sends nothing more.
    """

    old: bytes
    new: bytes
    hits: int = 0
    least: int = 4
    _held: dict[tuple[int, str], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.old) != len(self.new) or not self.old or self.least < 1:
            raise ValueError("the new bytes must be as many as the old ones")

    def __call__(self, connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        """Passes the piece on; what may be the beginning of the wanted bytes waits for the next one."""
        key = (connection, direction)
        data = self._held.pop(key, b"") + data
        self.hits += data.count(self.old)
        data = data.replace(self.old, self.new)
        for length in range(min(len(self.old) - 1, len(data)), self.least - 1, -1):
            if data.endswith(self.old[:length]):
                self._held[key] = data[-length:]
                return data[:-length]
        return data


@dataclass
class OldVersions:
    """Takes TLS 1.3 out of what a ClientHello offers (RFC 8446, 4.2.1), so that an older one remains. `hits` counts."""

    hits: int = 0

    def __call__(self, connection: int, direction: Direction, offset: int, data: bytes) -> bytes:
        """Changes the extension supported_versions where it stands in a connection's first bytes."""
        begin = data.find(b"\x00\x2b\x00") if direction == "forward" and offset < 64 else -1
        if begin < 0:
            return data
        end = begin + 4 + data[begin + 3]
        changed = data[begin:end].replace(b"\x03\x04", b"\x03\x03")
        self.hits += changed != data[begin:end]
        return data[:begin] + changed + data[end:]
