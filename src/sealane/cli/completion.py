"""Names for the shell's completion, asked from the agent; silence where none answers soon."""

from collections.abc import Callable

from sealane.cli.client import AgentClient
from sealane.errors import SealaneError

_PATIENCE_S = 1.0


def vm_names(incomplete: str) -> list[str]:
    """The agent's VMs."""
    return _matching(incomplete, lambda: [vm.name for vm in AgentClient(timeout_s=_PATIENCE_S).vms()])


def host_names(incomplete: str) -> list[str]:
    """The hosts that the agent trusts."""
    return _matching(incomplete, lambda: [peer.name for peer in AgentClient(timeout_s=_PATIENCE_S).peers()])


def moving_names(incomplete: str) -> list[str]:
    """The VMs that are being migrated."""
    return _matching(incomplete, lambda: [one.vm for one in AgentClient(timeout_s=_PATIENCE_S).migrations(active=True)])


def _matching(incomplete: str, ask: Callable[[], list[str]]) -> list[str]:
    try:
        return [name for name in ask() if name.startswith(incomplete)]
    except SealaneError:
        return []
