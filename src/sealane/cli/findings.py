"""What `sealane doctor` reports: findings, and what its checks are given."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from sealane.errors import SealaneError
from sealane.host.config import Settings, load_settings
from sealane.paths import Paths

Level = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    check: str
    level: Level
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Context:
    """What the checks are given to look at."""

    paths: Paths
    deep: bool = False


Check = Callable[[Context], Iterable[Finding]]


def configured(context: Context) -> Settings:
    """The settings, or the defaults where agent.toml cannot be read, which `check_configuration` tells."""
    try:
        return load_settings(context.paths.config)
    except SealaneError:
        return Settings()
