"""Where a registry is found: Docker's rules for names, plain HTTP, own certificates, mirrors and proxies.

The domain of a reference (`docker.io`, `localhost:5000`) becomes one or more endpoints to try in order. Loopback
addresses may speak plain HTTP or show any certificate, as with Docker; all others need TLS that verifies, unless the
settings call them insecure. Settings are one TOML file (see `Settings`); certificates also come from Docker's own
directories. Left out: talking to any of them.

Source: Docker documentation "Verify repository client with certificates" (certs.d); Go's httpproxy for NO_PROXY.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from labkernel.errors import UsageError

# The two names that Docker's own resolution needs: the domain of short names, and the host that serves it.
DOCKER_DOMAIN, DOCKER_HOST = "docker.io", "registry-1.docker.io"
SETTINGS_VARIABLE = "LABKERNEL_REGISTRIES"
LIMITS_VARIABLE = "LABKERNEL_LIMITS"


@dataclass(frozen=True)
class Endpoint:
    """One place that may serve a registry's names. `prefix` is a path before `/v2/`, mostly empty."""

    domain: str
    host: str
    port: int
    secure: bool = True
    verify: bool = True
    prefix: str = ""
    ca_files: tuple[str, ...] = ()
    client_certificate: tuple[str, str] | None = None
    mirror: bool = False

    @property
    def origin(self) -> str:
        """`https://host:port`, what requests are relative to."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{shown}:{self.port}"

    @property
    def is_local(self) -> bool:
        return is_loopback(self.host)


@dataclass(frozen=True)
class Limits:
    """What a registry or an archive can make us do at most; in the settings' table `limits`, or by name in the
    variable LABKERNEL_LIMITS (`layers=100,layer_bytes=2g`), which comes first. Sizes take k, m, g, t (of 1024).
    """

    layers: int = 500
    """Layers of an image. The kernel stacks no more."""
    layer_bytes: int = 1 << 36
    """What one layer may unpack to."""
    layer_members: int = 5_000_000
    """Files in one layer."""
    image_bytes: int = 1 << 40
    """Compressed bytes of an image's layers; never more than is free on the disk."""
    stall_s: float = 30.0
    """A registry that sends nothing for so long is given up."""
    answer_s: float = 60.0
    """Time for an answer without its body."""
    wait_s: float = 30.0
    """A registry that asks for more patience (Retry-After) is not waited for: the user is told."""

    @classmethod
    def parse(cls, found: Mapping[str, Any], where: str) -> Limits:
        """Raises UsageError, naming `where`, for an unknown limit and for one that is no positive number."""
        known = {each.name: each.type for each in fields(cls)}
        given: dict[str, Any] = {}
        for name, value in found.items():
            if name not in known:
                raise UsageError(f"{where}: no limit is called {name!r}", resolution=f"there are {', '.join(known)}")
            number = _number(value)
            if number is None or number <= 0:
                raise UsageError(f"{where}: {name} = {value!r} is no positive number", resolution='e.g. 100, "20g"')
            given[name] = number if known[name] == "float" else int(number)
        return cls(**given)

    @classmethod
    def of_environment(cls, environ: Mapping[str, str], found: Mapping[str, Any], where: str) -> Limits:
        """The settings' limits, with those of LABKERNEL_LIMITS in their place."""
        words = [word for word in environ.get(LIMITS_VARIABLE, "").split(",") if word.strip()]
        named = {key.strip(): value.strip() for key, _, value in (word.partition("=") for word in words)}
        cls.parse(named, LIMITS_VARIABLE)
        return cls.parse({**found, **named}, where)


@dataclass(frozen=True)
class Settings:
    """What a user may say about registries, in TOML, in `registries.toml` of the user's configuration directory (the
    variable LABKERNEL_REGISTRIES names another file):

        insecure = ["registry.lan:5000", "10.0.0.0/8"]     # plain HTTP or any certificate
        downloads = 3                                       # layers at once

        [ca]
        "registry.lan:5000" = "/etc/ssl/our-ca.pem"

        [mirrors]
        "docker.io" = ["http://127.0.0.1:5001"]             # asked first; then the registry itself

        [limits]                                            # see `Limits`
        layer_bytes = "4g"
    """

    insecure: tuple[str, ...] = ()
    ca: Mapping[str, str] = field(default_factory=dict)
    mirrors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    downloads: int = 3
    certificates: tuple[Path, ...] = ()
    limits: Limits = Limits()

    @classmethod
    def load(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """The settings of this user. Raises UsageError for a file that does not fit."""
        base = Path(environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config"))
        named = environ.get(SETTINGS_VARIABLE)
        path = Path(named) if named else base / "labkernel" / "registries.toml"
        certificates = (Path("/etc/docker/certs.d"), base / "docker" / "certs.d")
        try:
            text = path.read_text()
        except FileNotFoundError:
            if named:
                raise UsageError(f"{SETTINGS_VARIABLE} names {path}, which is not there") from None
            text = ""
        except OSError:
            text = ""
        return replace(cls.parse(text, str(path), environ), certificates=certificates)

    @classmethod
    def parse(cls, text: str, path: str, environ: Mapping[str, str] = os.environ) -> Settings:
        """Settings from TOML; `path` is for messages."""
        found: dict[str, Any] = {}
        if text:
            import tomllib

            try:
                found = tomllib.loads(text)
            except tomllib.TOMLDecodeError as err:
                raise UsageError(f"{path}: {err}") from None
        limits = found.get("limits", {})
        if not isinstance(limits, dict):
            raise UsageError(f"{path}: limits is a table: [limits]")
        try:
            return cls(
                insecure=tuple(_strings(found.get("insecure", []))),
                ca={str(key): str(value) for key, value in dict(found.get("ca", {})).items()},
                mirrors={str(key): tuple(_strings(value)) for key, value in dict(found.get("mirrors", {})).items()},
                downloads=max(1, min(16, int(found.get("downloads", 3)))),
                limits=Limits.of_environment(environ, limits, path),
            )
        except (TypeError, ValueError) as err:
            raise UsageError(
                f"{path}: {err}", resolution="insecure: a list; ca and mirrors: tables by domain"
            ) from None

    def endpoints(self, domain: str, *, mirrors: bool = True) -> list[Endpoint]:
        """Where to ask for names of `domain`, in order. `mirrors=False` for pushes and logins."""
        found = []
        for url in self.mirrors.get(domain, ()) if mirrors else ():
            parts = urlsplit(url if "://" in url else f"https://{url}")
            secure = parts.scheme != "http"
            number = parts.port or (443 if secure else 80)
            prefix = parts.path.rstrip("/")
            mirror = Endpoint(parts.netloc, parts.hostname or "", number, secure=secure, prefix=prefix, mirror=True)
            found.append(self._with_certificates(mirror))
        host, port = split_host(DOCKER_HOST if domain == DOCKER_DOMAIN else domain)
        if is_loopback(host):
            # The first answer decides. Nothing secret goes out before it: a first request carries no credentials.
            found.append(self._with_certificates(Endpoint(domain, host, port or 80, secure=False, verify=False)))
            found.append(self._with_certificates(Endpoint(domain, host, port or 443, verify=False)))
        elif self.is_insecure(domain, host):
            found.append(self._with_certificates(Endpoint(domain, host, port or 443, verify=False)))
            found.append(Endpoint(domain, host, port or 80, secure=False, verify=False))
        else:
            found.append(self._with_certificates(Endpoint(domain, host, port or 443)))
        return found

    def is_insecure(self, domain: str, host: str) -> bool:
        """Whether the settings call this registry insecure, by domain, host or network."""
        if domain in self.insecure or host in self.insecure:
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return any(_in_network(address, each) for each in self.insecure)

    def _with_certificates(self, endpoint: Endpoint) -> Endpoint:
        if not endpoint.secure:
            return endpoint
        names = tuple(dict.fromkeys((endpoint.domain, f"{endpoint.host}:{endpoint.port}", endpoint.host)))
        authorities = [self.ca[name] for name in names if name in self.ca]
        pair = None
        for directory in (base / name for base in self.certificates for name in names):
            if not directory.is_dir():
                continue
            authorities += sorted(str(path) for path in directory.glob("*.crt"))
            for certificate in sorted(directory.glob("*.cert")):
                pair = (str(certificate), str(certificate.with_suffix(".key")))
        verify = endpoint.verify or bool(authorities)
        return replace(endpoint, ca_files=tuple(authorities), client_certificate=pair, verify=verify)


def split_host(domain: str) -> tuple[str, int | None]:
    """Host without brackets, and port where the domain names one."""
    host, colon, port = domain.rpartition(":")
    if colon and port.isdigit() and not host.endswith(":"):
        return host.strip("[]"), int(port)
    return domain.strip("[]"), None


def is_loopback(host: str) -> bool:
    """Whether the host is `localhost`, of 127.0.0.0/8 or ::1: by its name alone, nothing is looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_proxy(scheme: str, host: str, port: int, environ: Mapping[str, str] = os.environ) -> str | None:
    """URL of the proxy for `scheme`://host:port by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, or None.

    Lower case wins, as with curl and Go. Loopback is never asked through a proxy.
    """
    names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY", "all_proxy", "ALL_PROXY")
    proxy = next((environ[name] for name in names if environ.get(name)), None)
    if proxy is None or is_loopback(host):
        return None
    exceptions = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    if any(_excepts(each.strip(), host, port) for each in exceptions.split(",")):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


def proxy_address(url: str) -> tuple[str, int, str | None]:
    """(host, port, "user:password" or None) of a proxy URL. Raises UsageError for one that is no HTTP proxy."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "") or not parts.hostname:
        raise UsageError(f"proxy {parts.scheme}://{parts.hostname}: only HTTP proxies are supported")
    login = None
    if parts.username:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return parts.hostname, parts.port or 80, login


def _excepts(rule: str, host: str, port: int) -> bool:
    if not rule:
        return False
    if rule == "*":
        return True
    name, number = split_host(rule)
    if number is not None and number != port:
        return False
    name = name.removeprefix("*")
    try:
        return _in_network(ipaddress.ip_address(host), name)
    except ValueError:
        bare = name.removeprefix(".")
        return host.endswith(f".{bare}") or (host == bare and not name.startswith("."))


def _in_network(address: Any, network: str) -> bool:
    try:
        return address in ipaddress.ip_network(network, strict=False)
    except ValueError:
        return False


def _number(value: Any) -> float | None:
    """A number, or text with k, m, g, t (powers of 1024); None for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, str):
        return None
    text = value.strip().lower().removesuffix("b")
    unit = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}.get(text[-1:], 1)
    try:
        return float(text if unit == 1 else text[:-1]) * unit
    except ValueError:
        return None


def _strings(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"not a list of strings: {value!r}")
    return value
