"""What a registry says of a name. Source: Docker Engine API, DistributionInspect."""

from __future__ import annotations

from typing import Any

from ..errors import RegistryError
from ..imaging.lookups import distribution, given_logins
from ..imaging.pulls import Pulls, parse_name
from .call import Call
from .errors import ApiError
from .routes import Route


def inspect(call: Call) -> Any:
    name = call.params["name"]
    logins = given_logins(call.headers.get("X-Registry-Auth", ""), parse_name(name).domain)
    try:
        return distribution(Pulls(call.engine.images, credentials=logins), name)
    except RegistryError as err:
        status = getattr(err, "status", None)
        if status in (401, 403, 404):
            raise ApiError(404 if status == 404 else 401, err.brief) from None
        raise


ROUTES = (Route("GET", "/distribution/{name:path}/json", inspect, since=(1, 30), slow=True),)
