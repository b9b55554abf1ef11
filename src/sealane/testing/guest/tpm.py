"""A guest that uses its TPM: the usual initramfs, followed by `tpmuser.c` and an init that starts it beside the worker."""

import stat
from functools import cache
from hashlib import sha256
from pathlib import Path

from sealane.testing.cache import build_once
from sealane.testing.guest.build import compile_static, guest_initrd, newc_entry

_HERE = Path(__file__).parent


@cache
def tpm_initrd() -> Path:
    """The initramfs, built where its ingredients have changed."""
    source, usual = _HERE / "tpmuser.c", guest_initrd()
    init = (_HERE / "init").read_bytes().replace(b"/bin/worker\n", b"/bin/tpmuser &\n/bin/worker\n")
    digest = sha256(b"\0".join((str(usual).encode(), init, source.read_bytes()))).hexdigest()
    return build_once(f"guest-tpm-{digest[:20]}", lambda made: _build(made, usual, init, source)) / "initrd"


def _build(directory: Path, usual: Path, init: bytes, source: Path) -> None:
    archive = b"".join(
        (
            newc_entry("init", mode=stat.S_IFREG | 0o755, data=init),
            newc_entry("bin/tpmuser", mode=stat.S_IFREG | 0o755, data=compile_static(source)),
            newc_entry("TRAILER!!!", mode=0),
        )
    )
    first = usual.read_bytes()
    (directory / "initrd").write_bytes(first + bytes(-len(first) % 4) + archive)
