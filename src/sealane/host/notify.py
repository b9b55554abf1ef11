"""sd_notify(3), the little of it that is needed: READY, STOPPING and STATUS to the service manager."""

import contextlib
import os
import socket


def notify(*lines: str) -> bool:
    """Send lines like "READY=1" to the service manager; False when there is none that listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.sendall("\n".join(lines).encode())
        return True
    return False
