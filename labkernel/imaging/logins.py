"""Log-ins: tried at the registry before they are kept; kept in labkernel's own file, never in Docker's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UsageError
from ..oci.credentials import Credentials, Login
from ..oci.endpoints import DOCKER_DOMAIN, Settings
from ..oci.registry import Refused, Registry

_DOCKER_NAMES = {"", "docker.io", "index.docker.io", "registry-1.docker.io"}


class Logins:
    """The log-ins of this user."""

    def __init__(self, credentials: Credentials | None = None, settings: Settings | None = None) -> None:
        self._credentials = credentials or Credentials()
        self._settings = settings

    def login(
        self, server: str | None, username: str, password: str, *, notify: Callable[[str], None] = lambda line: None
    ) -> Path:
        """Check a user name and password at `server` (Docker Hub without one) and keep them; returns the file.

        Raises Refused when the registry does not take them, RegistryError when it does not answer.
        """
        domain = find_domain(server)
        if not username or not password:
            raise UsageError("a user name and a password are needed", exit_code=1)
        login = Login(username, password)
        with Registry(domain, settings=self._settings, login=login, mirrors=False, notify=notify) as registry:
            try:
                registry.check()
            except Refused as err:
                if err.status == 401:
                    raise Refused(
                        f"Get {registry.endpoint.origin}/v2/: unauthorized: incorrect username or password",
                        status=401,
                        code=err.code,
                    ) from err
                raise
        return self._credentials.store(domain, login)

    def logout(self, server: str | None) -> tuple[str, bool]:
        """Forget the log-in of `server`: (its domain, whether there was one of ours)."""
        domain = find_domain(server)
        return domain, self._credentials.erase(domain)


def find_domain(server: str | None) -> str:
    """The domain a log-in is for: `docker.io` for none, a URL's host otherwise."""
    name = (server or "").removeprefix("https://").removeprefix("http://").split("/")[0]
    return DOCKER_DOMAIN if name in _DOCKER_NAMES else name
