"""The API's form of errors: a status of HTTP and one sentence."""

from __future__ import annotations

from cowfs.errors import (
    AlreadyExists,
    CowfsError,
    FailedPrecondition,
    InvalidArgument,
    LimitExceeded,
    NotFound,
    Unsupported,
)

__all__ = ["ApiError", "NotModified", "not_offered", "status_of"]


class ApiError(CowfsError):
    """An error answer with a status that no class of cowfs has."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NotModified(ApiError):
    """Nothing to do: status 304, without a body."""

    def __init__(self) -> None:
        super().__init__(304, "")


_STATUS: tuple[tuple[type[CowfsError], int], ...] = (
    (NotFound, 404),
    (AlreadyExists, 409),
    (InvalidArgument, 400),
    (FailedPrecondition, 409),
    (Unsupported, 501),
    (LimitExceeded, 507),
)


def status_of(error: CowfsError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, ApiError):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def not_offered(what: str) -> ApiError:
    """A 501 error with a sentence."""
    return ApiError(501, f"cowfs does not offer {what}")
