"""Errors as the REST interface tells them (RFC 9457), and migrations that failed as the journal keeps them."""

from collections.abc import Mapping
from typing import Final

from sealane.errors import CATALOGUE, SealaneError, make_error
from sealane.host.models import Problem

MEDIA_TYPE: Final = "application/problem+json"

# Where HTTP has a better word than the family's status (RFC 9110, section 15).
_STATUS: Final[Mapping[str, int]] = {
    "vm.unknown": 404,
    "migration.unknown": 404,
    "trust.unknown": 404,
    "agent.stopping": 503,
    "host.disk-full": 507,
}


def problem_of(error: BaseException) -> Problem:
    """What a person or a program is told of an error; of an unexpected one only that it happened."""
    if not isinstance(error, SealaneError):
        error = make_error("internal.error", f"an unexpected {type(error).__name__}")
    return Problem(
        title=CATALOGUE[error.code].summary,
        status=_STATUS.get(error.code, error.http_status),
        detail=error.detail,
        code=error.code,
        mend=error.mend,
        retryable=error.retryable,
    )


def error_of(problem: Problem) -> SealaneError:
    """The error that a problem was made of."""
    return make_error(problem.code, problem.detail, mend=problem.mend)
