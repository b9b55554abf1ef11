"""A command line and an agent that are not of the same version: said in those words, with what mends it.

Both sides have closed models, so what one of them does not know is refused and never dropped. An agent goes on as it was
started when a new version is installed, which is how the two come apart.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import sealane
from sealane.errors import SealaneError, make_error

if TYPE_CHECKING:  # the command line does not pay for the agent's web server
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Names the version of whoever sends it, in requests and in answers.
VERSION_HEADER: Final = "sealane-version"
_BUILD_DIGITS: Final = 8

AGENT_IS_OLDER: Final = "restart the agent: `systemctl restart sealane` (VMs run on; it waits for migrations under way)"
CALLER_IS_OLDER: Final = "use the `sealane` of the version that the agent was started from"


@functools.cache
def own_version() -> str:
    """This installation's version and a digest of its code: `0.1.0+5f3a09c2`. Asked for when a process starts, it stays true."""
    root = Path(sealane.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{sealane.__version__}+{digest.hexdigest()[:_BUILD_DIGITS]}"


def is_older(misfits: Sequence[Mapping[str, Any]]) -> bool:
    """Whether who found these misfits (pydantic's) in the other's words is the older one: it met a field that it does not know."""
    return any(misfit["type"] == "extra_forbidden" for misfit in misfits)


def names_of(misfits: Sequence[Mapping[str, Any]]) -> str:
    """The fields that do not fit, never their content."""
    found = [".".join(str(part) for part in misfit["loc"] if part not in {"body", "query"}) for misfit in misfits]
    return ", ".join(dict.fromkeys(f"`{name}`" for name in found if name)) or "the message"


def refusal(caller: str, words: str, *, agent_is_older: bool) -> SealaneError:
    """What an agent tells a caller of another version."""
    mend = AGENT_IS_OLDER if agent_is_older else CALLER_IS_OLDER
    detail = f"the caller is Sealane {caller[:64]}, and this agent {own_version()}: {words}"
    return make_error("agent.version", detail, mend=mend)


class Versioned:
    """ASGI: every answer names the agent's version."""

    def __init__(self, app: "ASGIApp", version: str | None = None) -> None:
        """`version` is this installation's own, unless another one is played."""
        self._app = app
        self._header = (VERSION_HEADER.encode(), (version or own_version()).encode())

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        """Pass all on, with one header more."""

        async def with_version(message: "Message") -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), self._header]
            await send(message)

        await self._app(scope, receive, with_version)
