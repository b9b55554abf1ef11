"""RC4, for the first seed's comparison only: it is broken (RFC 7465 forbids it in TLS)."""

from cryptography.hazmat.decrepit.ciphers.algorithms import ARC4
from cryptography.hazmat.primitives.ciphers import Cipher


class Rc4:
    """One RC4 keystream, which goes on from call to call."""

    def __init__(self, key: bytes) -> None:
        self._rc4 = Cipher(ARC4(key), mode=None).encryptor()

    def apply_into(self, data: memoryview, out: bytearray | memoryview) -> None:
        """XOR `data` with the next bytes of the keystream; `out` is as long as `data` and may be the same memory."""
        self._rc4.update_into(data, out)

    def __repr__(self) -> str:
        return "Rc4()"
