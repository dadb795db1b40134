"""Which error is which status code, in one table, and docker's shape of an error. Source: Engine API, "Errors"."""

from __future__ import annotations

from typing import Any

from ..errors import (
    BuildError,
    ConflictError,
    ContainerExit,
    DiskFull,
    DockerfileError,
    DriverError,
    InvalidReference,
    LabkernelError,
    NotFoundError,
    RegistryError,
    StartError,
    UsageError,
)

# The first that fits counts, so a subclass stands before its base.
STATUSES: tuple[tuple[type[LabkernelError], int], ...] = (
    (NotFoundError, 404),
    (ConflictError, 409),
    (UsageError, 400),
    (InvalidReference, 400),
    (BuildError, 500),
    (DockerfileError, 400),
    (ContainerExit, 500),
    (DriverError, 501),
    (DiskFull, 507),
    (RegistryError, 500),
    (LabkernelError, 500),
)


class ApiError(Exception):
    """An answer other than success that a handler decides itself: `raise ApiError(503, "…")`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class ClientGone(Exception):
    """The client has closed its connection: what is done for it alone can end."""


def status_of(err: BaseException) -> int:
    """The status code of an error; 500 for a bug."""
    if isinstance(err, ApiError):
        return err.status
    if isinstance(err, StartError):
        # docker: what the image lacks is the client's mistake, what the engine could not do is its own
        return 400 if err.exit_code in (126, 127) else 500
    return next((status for kind, status in STATUSES if isinstance(err, kind)), 500)


def message_of(err: BaseException) -> str:
    """The one line clients show and some of them compare; a bug tells its class."""
    if isinstance(err, ApiError):
        return err.message
    if isinstance(err, LabkernelError):
        return err.brief
    return f"{type(err).__name__}: {err}"


def document_of(err: BaseException) -> dict[str, Any]:
    """Docker's `{"message": …}`. What helps a person stands beside it as `hint`, which docker's clients pass over."""
    hint = err.resolution if isinstance(err, LabkernelError) else None
    return {"message": message_of(err), **({"hint": hint} if hint else {})}
