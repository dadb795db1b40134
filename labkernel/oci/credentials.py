"""Who we are to a registry: Docker's `config.json`, its credential helpers, and our own log-ins beside them.

Read: `$DOCKER_CONFIG/config.json` (default `~/.docker`), its `credHelpers`, `credsStore` and `auths`. `login` writes
to labkernel's own file, mode 0600, and never to Docker's: that one belongs to another program. Passwords go to helpers
on stdin and never on a command line or into a message.

Source: Docker documentation "docker login", "Credential helpers" (protocol: `get` with the server on stdin).
"""

from __future__ import annotations

import binascii
import json
import os
import secrets
from base64 import b64decode, b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from labkernel.errors import RegistryError, UsageError

from .endpoints import DOCKER_DOMAIN

# Docker's key for its own registry, older than registries were.
_DOCKER_KEY = "https://index.docker.io/v1/"
_HELPER_TIMEOUT_S = 15.0
_TOKEN_USER = "<token>"


class Login(NamedTuple):
    """A user name and password; or an identity token, which is exchanged for access tokens."""

    username: str
    password: str
    identity_token: str = ""

    def __repr__(self) -> str:
        return f"Login({self.username!r}, …)"


class Credentials:
    """The log-ins of one user."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        docker = environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
        base = Path(environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
        self.docker_file = Path(docker) / "config.json"
        self.own_file = base / "labkernel" / "auth.json"

    def find(self, domain: str) -> Login | None:
        """The log-in for a registry: ours, else Docker's helper for it, its store, its file. None for none.

        A helper that is broken or not installed raises RegistryError: silence would look like a wrong password.
        """
        own = _entry(_read(self.own_file), domain)
        if own is not None:
            return own
        docker = _read(self.docker_file)
        helpers = docker.get("credHelpers")
        helper = (
            next((helpers[key] for key in _keys(domain) if key in helpers), None) if isinstance(helpers, dict) else None
        )
        helper = helper or docker.get("credsStore")
        if isinstance(helper, str) and helper:
            found = _ask_helper(helper, domain)
            if found is not None:
                return found
        return _entry(docker, domain)

    def store(self, domain: str, login: Login) -> Path:
        """Remember a log-in in our own file; returns its path."""
        auths = self._own()
        encoded = b64encode(f"{login.username}:{login.password}".encode()).decode()
        entry = {"auth": encoded}
        if login.identity_token:
            entry["identitytoken"] = login.identity_token
        auths[_keys(domain)[0]] = entry
        self._write(auths)
        return self.own_file

    def erase(self, domain: str) -> bool:
        """Forget our log-in; False when there was none."""
        auths = self._own()
        gone = [auths.pop(key) for key in _keys(domain) if key in auths]
        if gone:
            self._write(auths)
        return bool(gone)

    def _own(self) -> dict[str, Any]:
        found = _read(self.own_file).get("auths")
        return dict(found) if isinstance(found, dict) else {}

    def _write(self, auths: Mapping[str, Any]) -> None:
        directory = self.own_file.parent
        try:
            directory.mkdir(parents=True, exist_ok=True)
            temporary = directory / f".auth-{secrets.token_hex(6)}"
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump({"auths": auths}, file, indent=1)
            os.replace(temporary, self.own_file)
        except OSError as err:
            raise UsageError(f"cannot write {self.own_file}: {err.strerror}") from err


def _keys(domain: str) -> tuple[str, ...]:
    if domain == DOCKER_DOMAIN:
        return (_DOCKER_KEY, "docker.io", "index.docker.io", "registry-1.docker.io")
    return (domain, f"https://{domain}", f"http://{domain}", f"https://{domain}/v2/", f"https://{domain}/v1/")


def _read(path: Path) -> dict[str, Any]:
    """The file as a dictionary; empty where there is none. Raises UsageError for one that is no JSON."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except (OSError, ValueError) as err:
        raise UsageError(f"{path} cannot be read: {err}", resolution="repair or remove it") from None
    return found if isinstance(found, dict) else {}


def _entry(document: Mapping[str, Any], domain: str) -> Login | None:
    auths = document.get("auths")
    if not isinstance(auths, dict):
        return None
    for key in _keys(domain):
        entry = auths.get(key)
        if isinstance(entry, dict) and (found := _decode(entry)) is not None:
            return found
    return None


def _decode(entry: Mapping[str, Any]) -> Login | None:
    username, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if entry.get("auth"):
        try:
            text = b64decode(str(entry["auth"])).decode()
        except (binascii.Error, ValueError):
            return None
        username, _, password = text.partition(":")
    token = str(entry.get("identitytoken") or "")
    return Login(username, password.strip("\0"), token) if username or token else None


def _ask_helper(name: str, domain: str) -> Login | None:
    """`docker-credential-NAME get`. None when it has nothing for this registry."""
    import shutil
    import subprocess

    if "/" in name or name.startswith("."):
        raise UsageError(f"not a credential helper: {name!r}")
    # Looked up here: a folder of PATH that may not be read would make a missing program a forbidden one.
    program = shutil.which(f"docker-credential-{name}")
    if program is None:
        raise RegistryError(
            f"the credential helper docker-credential-{name} of Docker's config.json is not installed",
            resolution="install it, take it out of config.json, or use `labkernel login`",
        )
    for key in _keys(domain)[:2]:
        try:
            done = subprocess.run(
                [program, "get"],
                input=key.encode(),
                capture_output=True,
                timeout=_HELPER_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as err:
            raise RegistryError(f"the credential helper docker-credential-{name} does not work: {err}") from None
        if done.returncode == 0:
            try:
                answer = json.loads(done.stdout)
                username, secret = str(answer["Username"]), str(answer["Secret"])
            except (ValueError, KeyError, TypeError):
                raise RegistryError(f"docker-credential-{name} answers with something else than credentials") from None
            return Login("", "", secret) if username == _TOKEN_USER else Login(username, secret)
        if b"credentials not found" not in done.stdout + done.stderr:
            text = (done.stderr or done.stdout).decode(errors="replace").strip()[:200]
            raise RegistryError(f"docker-credential-{name} failed: {text or done.returncode}")
    return None
