"""Loading the cryptographic library whole, for a process that will not be able to open a file later."""

import importlib
import pkgutil

import cryptography


def load_everything() -> None:
    """Import every module of pyca/cryptography: its native part imports some only when it first needs them."""
    for module in pkgutil.walk_packages(cryptography.__path__, "cryptography."):
        importlib.import_module(module.name)
