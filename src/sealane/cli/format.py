"""Numbers and times in people's words, and people's words as numbers.

SI units for what crosses a network (GB, Gb/s), IEC for memory and disks (GiB), times with the unit that fits.
"""

import math
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from sealane.errors import UsageError
from sealane.limits import DEFAULT_PORT

_SI: Final = ("", "k", "M", "G", "T", "P", "E")
_IEC: Final = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_RATE: Final = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]i?)?(b|bit|B)(?:/s|ps)\s*$")
_MEBI: Final = 1024


def network_bytes(count: float) -> str:
    """Bytes on a network: `4.1 GB`."""
    return _scaled(count, 1000, _SI, "B")


def memory_bytes(count: float) -> str:
    """Bytes of memory or disk: `4 GiB`."""
    return _scaled(count, _MEBI, _IEC, "B")


def rate(bytes_per_s: float) -> str:
    """A network's rate, in bits as networks are sold: `9.4 Gb/s`."""
    return _scaled(bytes_per_s * 8, 1000, _SI, "b/s")


def _scaled(value: float, base: int, prefixes: Sequence[str], unit: str) -> str:
    step = 0
    while step < len(prefixes) - 1 and _rounded(value) >= base:
        value /= base
        step += 1
    return f"{_number(value)} {prefixes[step]}{unit}"


def _rounded(value: float) -> float:
    return round(value, 1) if value < 10 else round(value)


def _number(value: float) -> str:
    """At most three digits: one decimal below ten, none where it says nothing."""
    return f"{_rounded(value):g}" if value < 1e6 else f"{value:.0f}"


def duration(seconds: float) -> str:
    """A span: `31 ms`, `4.8 s`, `2 min 5 s`, `3 h 20 min`, `12 days`."""
    if seconds < 0.9995:
        return f"{_rounded(max(0.0, seconds) * 1000):g} ms"
    if seconds < 59.5:
        return f"{_rounded(seconds):g} s"
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{round(seconds / 86_400)} days"


def ago(then: datetime, now: datetime | None = None) -> str:
    """How long ago: `2 min 5 s ago`; `just now` below a second and where a clock was set back."""
    seconds = ((now or datetime.now(UTC)) - then).total_seconds()
    return "just now" if seconds < 1 else f"{duration(seconds)} ago"


def percent(done: float, total: float) -> int | None:
    """A share in whole per cent between 0 and 100, rounded down; None where the total is not known."""
    if total <= 0 or not math.isfinite(done):
        return None
    return max(0, min(100, math.floor(100 * done / total)))


def parse_rate(text: str) -> int:
    """`10Gb/s`, `1.25 GB/s`, `800Mbps`, `100MiB/s` as bytes per second; `unlimited` is 0. Raises UsageError."""
    if text.strip().lower() in {"unlimited", "none", "0"}:
        return 0
    match = _RATE.match(text)
    if match is None:
        raise UsageError(
            "usage.argument",
            f"{text!r} is not a rate",
            mend="write it like 10Gb/s (bits) or 1.2GB/s (bytes), or `unlimited`",
        )
    number, prefix, unit = match.groups()
    factor = _factor(prefix or "")
    bytes_per_s = float(number) * factor / (1 if unit == "B" else 8)
    if not 1 <= bytes_per_s < 2**63:
        raise UsageError("usage.argument", f"{text!r} is not a rate that can be kept", mend="give at least 8b/s")
    return int(bytes_per_s)


def _factor(prefix: str) -> int:
    step = "kMGT".find(prefix[:1].replace("K", "k")) + 1 if prefix else 0
    base = _MEBI if prefix.endswith("i") else 1000
    return int(base**step)


def parse_address(text: str, *, default_port: int = DEFAULT_PORT) -> tuple[str, int]:
    """`HOST`, `HOST:PORT`, `[V6]`, `[V6]:PORT` or a bare IPv6 address as host and port. Raises UsageError."""
    bracketed = re.fullmatch(r"\[([^\[\]]+)\](?::(.*))?", text)
    if bracketed is not None:
        host, port = bracketed.group(1), bracketed.group(2)
    elif text.count(":") > 1:
        host, port = text, None
    else:
        host, colon, rest = text.partition(":")
        port = rest if colon else None
    if not host or any(char.isspace() or char in "[]/" for char in host):
        raise UsageError("usage.argument", f"{text!r} is not an address", mend="write HOST, HOST:PORT or [IPv6]:PORT")
    if port is None:
        return host, default_port
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65_535):
        raise UsageError("usage.argument", f"{port!r} is not a port", mend="give a port from 1 to 65535")
    return host, int(port)


def show_address(host: str, port: int | None) -> str:
    """The reverse of `parse_address`."""
    shown = f"[{host}]" if ":" in host else host
    return shown if port is None else f"{shown}:{port}"


def short_fingerprint(fingerprint: str) -> str:
    """`SHA256:7d1f…c2`, for tables only: people compare whole ones."""
    return f"{fingerprint[:11]}…{fingerprint[-2:]}" if len(fingerprint) > 16 else fingerprint
