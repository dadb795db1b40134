"""A log-in is tried at its registry; only the client keeps it. Source: Docker Engine API, SystemAuth."""

from __future__ import annotations

from typing import Any

from ..errors import RegistryError
from ..imaging.lookups import try_login
from .call import Call
from .errors import ApiError
from .routes import Route


def login(call: Call) -> Any:
    try:
        return try_login(call.body)
    except RegistryError as err:
        if getattr(err, "status", None) in (401, 403):
            raise ApiError(401, err.brief) from None
        raise


ROUTES = (Route("POST", "/auth", login, body=dict, slow=True),)
