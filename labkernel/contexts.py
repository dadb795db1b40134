"""Which engine commands are for: the embedded one, or a daemon elsewhere. Docker's own contexts are read, too.

Ours are kept in `$XDG_CONFIG_HOME/labkernel/contexts.json` (default `~/.config`); Docker's below `$DOCKER_CONFIG` are
never written. `LABKERNEL_CONTEXT` (a name or an address) goes before the chosen one. Asked before every command, so
light.
Source: docker documentation, "docker context", "Change the default context".
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ConflictError, NotFoundError, UsageError

if TYPE_CHECKING:
    from .engine import Engine

EMBEDDED = "embedded"
VARIABLE = "LABKERNEL_CONTEXT"
SCHEMES = ("unix://", "tcp://", "ssh://", "http://", "https://")


class NoSuchContext(NotFoundError):
    """No context of that name, ours or Docker's."""

    kind = "context"
    listing = "context ls"


class Context(NamedTuple):
    """An engine: `host` is its address (empty for the embedded one), `tls` the folder or files of its certificates
    (`ca`, `cert`, `key`), `source` who keeps it: labkernel, docker, or nobody (an address given as a name)."""

    name: str
    host: str
    description: str = ""
    tls: dict[str, str] = {}
    source: str = "labkernel"

    def to_dict(self) -> dict[str, Any]:
        """As `docker context inspect` shows it."""
        endpoint = {"Host": self.host, "SkipTLSVerify": False}
        return {
            "Name": self.name,
            "Metadata": {"Description": self.description},
            "Endpoints": {"docker": endpoint if self.host else {}},
            "TLSMaterial": {"docker": sorted(os.path.basename(path) for path in self.tls.values())} if self.tls else {},
            "Source": self.source,
        }


Found = list[Context]


def is_address(text: str) -> bool:
    return text.startswith(SCHEMES)


class Contexts:
    """The contexts of a user."""

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._environ = environ
        base = environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
        self.file = os.path.join(base, "labkernel", "contexts.json")
        self._docker = environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")

    def current(self) -> str:
        """The name (or address) commands are for."""
        found = self._environ.get(VARIABLE) or self._read().get("current")
        return str(found or EMBEDDED)

    def list(self) -> Found:
        """All of them: the embedded engine, ours, Docker's that ours do not hide."""
        found = {EMBEDDED: Context(EMBEDDED, "", "The engine in this process, on this user's store", source="built in")}
        for name, each in sorted(self._read().get("contexts", {}).items()):
            found[name] = Context(name, each["host"], each.get("description", ""), dict(each.get("tls") or {}))
        for each in self._of_docker():
            found.setdefault(each.name, each)
        return list(found.values())

    def get(self, name: str) -> Context:
        """The context of that name; an address is a context of its own. Raises NoSuchContext."""
        if is_address(name):
            return Context(name, name, source="address")
        for each in self.list():
            if each.name == name:
                return each
        raise NoSuchContext(name)

    def create(self, name: str, host: str, *, description: str = "", tls: Mapping[str, str] | None = None) -> Context:
        """Keep an address under a name. Raises UsageError, ConflictError."""
        if not name.replace("-", "").replace("_", "").replace(".", "").replace("+", "").isalnum():
            raise UsageError(f'context name "{name}" is invalid: letters, digits and +._- are allowed', exit_code=1)
        if not is_address(host):
            raise UsageError(
                f"invalid address: {host or '(none)'}", resolution="unix:///PATH, tcp://HOST:PORT or ssh://USER@HOST",
                exit_code=1,
            )  # fmt: skip
        if any(each.name == name for each in self.list()):
            raise ConflictError(f'context "{name}" already exists', exit_code=1)
        files = {key: os.path.abspath(os.path.expanduser(path)) for key, path in (tls or {}).items() if path}
        for path in files.values():
            if not os.path.isfile(path):
                raise UsageError(f"no such file: {path}", exit_code=1)
        data = self._read()
        data.setdefault("contexts", {})[name] = {"host": host, "description": description, "tls": files}
        self._write(data)
        return self.get(name)

    def use(self, name: str) -> Context:
        """Choose for all commands to come."""
        chosen = self.get(name)
        data = self._read()
        data["current"] = name
        if name == EMBEDDED:
            data.pop("current")
        self._write(data)
        return chosen

    def remove(self, name: str, *, force: bool = False) -> None:
        """Forget one of ours. Raises NoSuchContext, ConflictError for the one in use (unless forced) and Docker's."""
        if self.get(name).source != "labkernel":
            raise ConflictError(
                f'context "{name}" is not labkernel\'s', resolution="`docker context rm` removes Docker's", exit_code=1
            )
        data = self._read()
        if data.get("current") == name:
            if not force:
                raise ConflictError(f'context "{name}" is in use, set -f flag to force remove', exit_code=1)
            del data["current"]
        del data["contexts"][name]
        self._write(data)

    def _read(self) -> dict[str, Any]:
        try:
            with open(self.file, "rb") as file:
                found = json.loads(file.read())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as err:
            raise UsageError(f"{self.file} cannot be read: {err}", resolution="repair or remove it") from None
        return found if isinstance(found, dict) else {}

    def _write(self, data: Mapping[str, Any]) -> None:
        os.makedirs(os.path.dirname(self.file), exist_ok=True)
        temporary = f"{self.file}.{os.getpid()}"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            json.dump(data, file, indent=1)
        os.replace(temporary, self.file)

    def _of_docker(self) -> Found:
        """Docker's: `contexts/meta/<sha256 of the name>/meta.json`, certificates in `contexts/tls/<same>/docker`."""
        folder, found = os.path.join(self._docker, "contexts", "meta"), []
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            return []
        for each in names:
            try:
                with open(os.path.join(folder, each, "meta.json"), "rb") as file:
                    meta = json.loads(file.read())
                name, host = str(meta["Name"]), str(meta["Endpoints"]["docker"]["Host"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
            tls = os.path.join(self._docker, "contexts", "tls", each, "docker")
            files = {kind: os.path.join(tls, f"{kind}.pem") for kind in ("ca", "cert", "key")}
            known = {kind: path for kind, path in files.items() if os.path.isfile(path)}
            metadata = meta.get("Metadata")
            description = str(metadata.get("Description") or "") if isinstance(metadata, dict) else ""
            found.append(Context(name, host, description, known, "docker"))
        return found


def open_engine(name: str | None = None) -> Engine:
    """The engine of a context (default: the current one). Raises NoSuchContext, and what opening it raises."""
    contexts = Contexts()
    chosen = name or contexts.current()
    if chosen == EMBEDDED:
        from .engine import Engine

        return Engine.open()
    from .remote.engine import connect

    # Names, arguments and results are the same as far as a remote engine has them.
    return connect(contexts.get(chosen))  # type: ignore[return-value]
