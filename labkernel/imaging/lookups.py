"""What clients of the Engine API ask of registries without moving an image: a log-in tried, a name looked up, a search.

Also log-ins that come with a request and are kept nowhere. Source: Docker Engine API, SystemAuth, DistributionInspect,
ImageSearch; distribution-spec, "Listing"; Docker Registry HTTP API V2, "Catalog".
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from ..errors import RegistryError, UsageError
from ..oci import manifest as oci
from ..oci import reference
from ..oci.credentials import Credentials, Login
from ..oci.registry import Refused, Registry
from .logins import find_domain

if TYPE_CHECKING:
    from .pulls import Pulls

CONFIG_MAX_BYTES = 4 << 20
CATALOG_MAX_BYTES = 4 << 20
_PAGE, _PAGES = 1000, 50


class GivenLogins(Credentials):
    """The log-ins that came with a request, by domain; for others the user's own files."""

    def __init__(self, given: dict[str, Login]) -> None:
        super().__init__()
        self._given = given

    def find(self, domain: str) -> Login | None:
        return self._given.get(domain) or super().find(domain)


def given_logins(header: str, default_domain: str) -> GivenLogins | None:
    """The log-in of an `X-Registry-Auth` header (base64 of JSON); None when it holds none. Raises UsageError."""
    if not header:
        return None
    try:
        padded = header + "=" * (-len(header) % 4)
        document = json.loads(base64.urlsafe_b64decode(padded.replace("+", "-").replace("/", "_")) or b"{}")
    except (ValueError, binascii.Error):
        raise UsageError("invalid X-Registry-Auth header: not base64 of JSON") from None
    if not isinstance(document, dict):
        raise UsageError("invalid X-Registry-Auth header: not an object")
    login = login_of(document)
    if login is None:
        return None
    server = str(document.get("serveraddress") or "")
    return GivenLogins({find_domain(server) if server else default_domain: login})


def login_of(document: dict[str, Any]) -> Login | None:
    """The log-in of an AuthConfig; None when it is empty."""
    username, password = str(document.get("username") or ""), str(document.get("password") or "")
    token = str(document.get("identitytoken") or "")
    if document.get("auth") and not username:
        try:
            username, _, password = base64.b64decode(str(document["auth"])).decode().partition(":")
        except (ValueError, binascii.Error):
            raise UsageError("invalid auth: not base64 of USER:PASSWORD") from None
    return Login(username, password, token) if username or token else None


def try_login(document: dict[str, Any]) -> dict[str, str]:
    """Ask a registry whether it takes a log-in; keeps nothing. Raises Refused (401) and RegistryError."""
    login = login_of(document)
    if login is None:
        raise UsageError("a user name and a password are needed")
    domain = find_domain(str(document.get("serveraddress") or ""))
    with Registry(domain, login=login, mirrors=False) as registry:
        try:
            registry.check()
        except Refused as err:
            if err.status != 401:
                raise
            brief = f"Get {registry.endpoint.origin}/v2/: unauthorized: incorrect username or password"
            raise Refused(brief, status=401, code=err.code) from err
    return {"Status": "Login Succeeded", "IdentityToken": ""}


def distribution(pulls: Pulls, ref: str) -> dict[str, Any]:
    """The descriptor and platforms of a name at its registry (DistributionInspect)."""
    wanted = reference.parse(ref).with_default_tag()
    with pulls.open(wanted.domain, notify=lambda line: None) as registry:
        fetched = registry.manifest(wanted.path, wanted.digest or wanted.tag or "latest")
        parsed = oci.parse(fetched.raw, fetched.media_type)
        if isinstance(parsed, oci.Index):
            platforms = [_platform(each.platform) for each in parsed.manifests if each.platform is not None]
        else:
            config = json.loads(registry.blob(wanted.path, parsed.config.digest, CONFIG_MAX_BYTES, "an image config"))
            platforms = [{"architecture": str(config.get("architecture") or ""), "os": str(config.get("os") or "")}]
            if config.get("variant"):
                platforms[0]["variant"] = str(config["variant"])
    descriptor = {
        "mediaType": parsed.media_type or fetched.media_type,
        "digest": fetched.digest,
        "size": len(fetched.raw),
    }
    return {"Descriptor": descriptor, "Platforms": platforms}


def _platform(platform: Any) -> dict[str, str]:
    found = {"architecture": platform.architecture, "os": platform.os}
    return {**found, "variant": platform.variant} if platform.variant else found


def search(pulls: Pulls, term: str, *, limit: int = 25) -> list[dict[str, Any]]:
    """Repositories whose name has the word of `term`, which may begin with a registry's domain.

    Docker Hub has a search of its own; other registries are asked for their catalog. Raises RegistryError.
    """
    text = term.strip().removeprefix("https://").removeprefix("http://")
    if not text:
        raise UsageError("term must be specified")
    domain, slash, word = text.partition("/")
    if not slash or not ("." in domain or ":" in domain or domain == "localhost"):
        return _search_hub(text, limit)
    with pulls.open(domain, notify=lambda line: None, mirrors=False) as registry:
        names = _catalog(registry, domain)
    found = sorted(name for name in names if isinstance(name, str) and word.lower() in name.lower())
    return [_found(f"{domain}/{name}") for name in found[:limit]]


def _catalog(registry: Registry, domain: str) -> list[Any]:
    """The names of all repositories, page by page."""
    names: list[Any] = []
    query = f"n={_PAGE}"
    for _ in range(_PAGES):
        try:
            with registry.call("GET", "", f"_catalog?{query}", actions="") as response:
                page = json.loads(response.read(CATALOG_MAX_BYTES, "a catalog")).get("repositories") or []
        except (ValueError, AttributeError):
            raise RegistryError(f"{domain} answers with something else than a catalog") from None
        names += page
        if len(page) < _PAGE:
            break
        query = urlencode({"n": _PAGE, "last": page[-1]})
    return names


def _found(name: str, **facts: Any) -> dict[str, Any]:
    return {"name": name, "description": "", "star_count": 0, "is_official": False, "is_automated": False, **facts}


def _search_hub(word: str, limit: int) -> list[dict[str, Any]]:
    from urllib.error import URLError
    from urllib.request import Request, urlopen

    url = f"https://index.docker.io/v1/search?{urlencode({'q': word, 'n': limit})}"
    try:
        with urlopen(Request(url, headers={"User-Agent": "labkernel"}), timeout=10) as response:
            results = json.loads(response.read(CATALOG_MAX_BYTES)).get("results") or []
    except (URLError, OSError, ValueError) as err:
        reason = getattr(err, "reason", None) or err
        raise RegistryError(
            f"Docker Hub cannot be searched: {reason}", resolution="REGISTRY/WORD searches another registry"
        ) from None
    return [
        _found(
            str(each.get("name")),
            description=str(each.get("description") or ""),
            star_count=int(each.get("star_count") or 0),
            is_official=bool(each.get("is_official")),
        )
        for each in results
        if isinstance(each, dict) and each.get("name")
    ][:limit]
