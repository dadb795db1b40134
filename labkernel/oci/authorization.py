"""What a registry asks for before it answers: challenges, Bearer tokens from a realm, Basic.

Source: distribution-spec; Docker's "Token Authentication Specification" (realm, service, scope; OAuth2 refresh);
RFC 9110, 11 for challenges. Tokens are kept in memory only, by scope.
"""

from __future__ import annotations

import json
import re
import threading
import time
from base64 import b64encode
from typing import NamedTuple
from urllib.parse import urlencode, urlsplit

from labkernel.errors import RegistryError

from .connections import Pool, check_place
from .credentials import Credentials, Login
from .endpoints import Endpoint

TOKEN_MAX = 1 << 18
_LEAST_LIFE_S = 60.0
_PARAMETER = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_SCHEME = re.compile(r"(?:^|,)\s*(Bearer|Basic)\b\s*", re.IGNORECASE)


class Challenge(NamedTuple):
    """One way in: `bearer` with realm, service and scope, or `basic`."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(values: list[str]) -> list[Challenge]:
    """The Bearer and Basic challenges of WWW-Authenticate headers, Bearer first."""
    found = []
    for value in values:
        value = value[:8192]
        marks = list(_SCHEME.finditer(value))
        for number, mark in enumerate(marks):
            end = marks[number + 1].start() if number + 1 < len(marks) else len(value)
            parameters = {
                match[1].lower(): re.sub(r"\\(.)", r"\1", match[2]) if match[2] is not None else match[3]
                for match in _PARAMETER.finditer(value, mark.end(), end)
            }
            found.append(Challenge(mark[1].lower(), parameters))
    return sorted(found, key=lambda challenge: challenge.scheme != "bearer")


class Authorizer:
    """The Authorization header for requests of one client to one endpoint."""

    def __init__(self, pool: Pool, endpoint: Endpoint, credentials: Credentials, login: Login | None = None) -> None:
        self._pool = pool
        self._endpoint = endpoint
        self._credentials = credentials
        self._login = login
        self._asked = login is not None
        self._tokens: dict[str, tuple[str, float]] = {}
        self._basic = ""
        self._lock = threading.Lock()

    @property
    def login(self) -> Login | None:
        """The log-in for this registry, looked up at the first need."""
        if not self._asked:
            self._login = self._credentials.find(self._endpoint.domain)
            self._asked = True
        return self._login

    def header(self, scope: str) -> str | None:
        """The header to send, as far as it is known before the registry has asked."""
        if self._basic:
            return self._basic
        token, until = self._tokens.get(scope, ("", 0.0))
        return f"Bearer {token}" if token and time.monotonic() < until else None

    def answer(self, challenges: list[Challenge], scope: str, rejected: str | None) -> str | None:
        """The header that meets the challenge, `rejected` being what was refused; None when there is nothing to try.

        Raises RegistryError when the token service refuses or lies, Broken.
        """
        with self._lock:
            known = self.header(scope)
            if known and known != rejected:
                return known  # another thread was first
            for challenge in challenges:
                if challenge.scheme == "bearer":
                    token, life_s = self._fetch(challenge.parameters, scope)
                    self._tokens[scope] = (token, time.monotonic() + life_s * 0.9)
                    return f"Bearer {token}"
                if self.login is not None and self.login.username:
                    header = basic_header(self.login)
                    if header == rejected:
                        return None
                    self._basic = header
                    return header
        return None

    def _fetch(self, parameters: dict[str, str], scope: str) -> tuple[str, float]:
        realm = parameters.get("realm", "")
        self._check_realm(realm)
        service = parameters.get("service", "")
        # Our own scope first: what is asked for (pull, push, mount) is known here better than by the challenge.
        scopes = scope.split() or parameters.get("scope", "").split()
        if self.login is not None and self.login.identity_token:
            raw, status = self._post(realm, service, scopes, self.login.identity_token)
        else:
            raw, status = self._get(realm, service, scopes)
        if status in (401, 403):
            why = "the user name or password is wrong" if self.login else "a log-in is needed"
            raise RegistryError(
                f"{self._endpoint.domain}: {why}",
                resolution=f"`labkernel login {self._endpoint.domain}`",
            )
        if status != 200:
            raise RegistryError(f"{self._endpoint.domain}: its token service answers with status {status}")
        try:
            answer = json.loads(raw)
            token = answer.get("token") or answer.get("access_token")
            life_s = float(answer.get("expires_in") or _LEAST_LIFE_S)
        except (ValueError, AttributeError, TypeError, RecursionError):
            token, life_s = None, 0.0
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
            raise RegistryError(f"{self._endpoint.domain}: its token service sends no usable token")
        return token, max(life_s, _LEAST_LIFE_S)

    def _check_realm(self, realm: str) -> None:
        parts = urlsplit(realm)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RegistryError(f"{self._endpoint.domain} names a token service that is no URL: {realm[:200]!r}")
        check_place(realm, self._endpoint)
        if parts.scheme == "http" and self._endpoint.secure and self._endpoint.verify:
            raise RegistryError(
                f"{self._endpoint.domain} wants the log-in sent in the clear to {parts.hostname}: refused"
            )

    def _get(self, realm: str, service: str, scopes: list[str]) -> tuple[bytes, int]:
        query = [("service", service)] if service else []
        query += [("scope", scope) for scope in scopes]
        headers = {}
        if self.login is not None:
            query.insert(0, ("account", self.login.username))
            headers["Authorization"] = basic_header(self.login)
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}" if query else realm
        with self._pool.request("GET", url, endpoint=self._endpoint, headers=headers) as response:
            return response.read(TOKEN_MAX, "a token"), response.status

    def _post(self, realm: str, service: str, scopes: list[str], token: str) -> tuple[bytes, int]:
        form = urlencode(
            {
                "grant_type": "refresh_token",
                "refresh_token": token,
                "service": service,
                "scope": " ".join(scopes),
                "client_id": "labkernel",
            }
        ).encode()
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        with self._pool.request("POST", realm, endpoint=self._endpoint, headers=headers, body=form) as response:
            return response.read(TOKEN_MAX, "a token"), response.status


def basic_header(login: Login) -> str:
    """RFC 7617."""
    return f"Basic {b64encode(f'{login.username}:{login.password}'.encode()).decode()}"
