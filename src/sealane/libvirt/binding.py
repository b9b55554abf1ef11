"""libvirt's own client library for Python, which is an extra: loaded when it is first needed, and quiet."""

import functools
from typing import Any

from sealane.errors import HostError, printable


@functools.cache
def load() -> Any:
    """The module `libvirt`; raises HostError `libvirt.missing`."""
    try:
        import libvirt  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise HostError("libvirt.missing") from error
    libvirt.registerErrorHandler(_say_nothing, None)  # it would write every error to standard error
    return libvirt


def _say_nothing(context: object, error: object) -> None:
    pass


def failure(error: Exception, code: str = "libvirt.failed") -> HostError:
    """libvirt's error as ours; `vm.unreachable` with FileNotFoundError as its cause where the domain is not there."""
    libvirt = load()
    number = error.get_error_code() if isinstance(error, libvirt.libvirtError) else None
    words = printable(str(error), 400)
    if number == libvirt.VIR_ERR_NO_DOMAIN:
        absent = HostError("vm.unreachable", words)
        absent.__cause__ = FileNotFoundError()
        return absent
    if number in {libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_RPC, libvirt.VIR_ERR_SYSTEM_ERROR}:
        return HostError("libvirt.unreachable", words)
    return HostError(code, words)
