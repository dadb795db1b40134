"""A registry as its client sees it: manifests, blobs, tags and referrers of one domain, with log-in and retries.

A `Registry` tries the endpoints of its domain in order (mirrors, TLS or plain HTTP where that is allowed) and stays
with the first that answers. What goes wrong on the way is tried again with growing pauses; what a registry refuses
becomes a RegistryError in words that docker users know. Moving whole blobs is in `transfer`.

Source: OCI distribution-spec 1.1, "Endpoints", "Error Codes"; RFC 9110, 10.2.3 for Retry-After.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

from labkernel.errors import RegistryError

from . import manifest as oci
from .authorization import Authorizer, parse_challenges
from .connections import Body, Broken, NotHTTP, Patience, Pool, Response, Unreachable
from .credentials import Credentials, Login
from .endpoints import DOCKER_DOMAIN, Endpoint, Settings

ACCEPTED = ", ".join((oci.OCI_MANIFEST, oci.DOCKER_MANIFEST, oci.OCI_INDEX, oci.DOCKER_LIST))
ERROR_MAX = 1 << 16
LIST_MAX = 4 << 20
LISTS_MAX = 16 << 20

MIRROR_RETRIES = 1

_ENDLESS = 1 << 30
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_NEXT_LINK = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?', re.IGNORECASE)
_PAGES = 1000

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Persistence:
    """How often a request is tried again, and after which pause (s, doubled each time, with some jitter)."""

    retries: int = 4
    pause_s: float = 0.3


class Refused(RegistryError):
    """A registry answered no. `status` is HTTP's, `code` the registry's own (MANIFEST_UNKNOWN, …)."""

    def __init__(self, brief: str, *, status: int, code: str = "", **parts: Any) -> None:
        super().__init__(brief, **parts)
        self.status = status
        self.code = code


class Fetched(NamedTuple):
    """A document as a registry sent it: bytes (of `digest`, verified) and the media type it was given."""

    raw: bytes
    media_type: str
    digest: str


class _Site:
    """An endpoint with what we know of it."""

    def __init__(self, endpoint: Endpoint, authorizer: Authorizer) -> None:
        self.endpoint = endpoint
        self.authorizer = authorizer
        self.answered = False
        self.broken = False
        """A mirror whose answers break off: the registry itself is asked instead."""


class Registry:
    """Client of one domain. Threads may share it. A context manager: leaving it closes its connections."""

    def __init__(
        self,
        domain: str,
        *,
        settings: Settings | None = None,
        credentials: Credentials | None = None,
        login: Login | None = None,
        mirrors: bool = True,
        notify: Notify = lambda line: None,
        patience: Patience | None = None,
        persistence: Persistence | None = None,
    ) -> None:
        """`login` replaces what the user's files hold; `notify` gets a line when we have to wait."""
        self.domain = domain
        settings = settings or Settings.load()
        limits = settings.limits
        self.pool = Pool(patience or Patience(stall_s=limits.stall_s, answer_s=limits.answer_s))
        self._longest_wait_s = limits.wait_s
        self.persistence = persistence or Persistence()
        self._notify = notify
        credentials = credentials or Credentials()
        self._sites = [
            _Site(endpoint, Authorizer(self.pool, endpoint, credentials, login))
            for endpoint in settings.endpoints(domain, mirrors=mirrors)
        ]

    @property
    def endpoint(self) -> Endpoint:
        """The endpoint that answered, or the first to be tried."""
        return next((site.endpoint for site in self._sites if site.answered), self._sites[0].endpoint)

    # -- manifests -------------------------------------------------------------------------------------------------

    def find_digest(self, repository: str, reference: str) -> str | None:
        """The digest that a tag has there now, without fetching (a HEAD: free of Docker Hub's pull limit).

        None when the registry does not say. Raises Refused (404: no such tag) and RegistryError.
        """
        with self.call("HEAD", repository, f"manifests/{reference}", accept=ACCEPTED) as response:
            digest = response.headers.get("Docker-Content-Digest", "")
            response.drain()
        return digest if oci.is_digest(digest) else None

    def manifest(self, repository: str, reference: str) -> Fetched:
        """Manifest or index of a tag or digest, verified: by the digest asked for, else by the one it announces."""
        path = f"manifests/{reference}"
        response, raw = self._document(repository, path, oci.MANIFEST_MAX, "a manifest", accept=ACCEPTED)
        announced = response.headers.get("Docker-Content-Digest", "")
        media_type = response.headers.get_content_type()
        wanted = reference if oci.is_digest(reference) else announced if oci.is_digest(announced) else None
        digest = wanted if wanted is not None and matches(raw, wanted) else oci.digest_of(raw)
        if wanted is not None and digest != wanted:
            raise RegistryError(
                f"{self.domain} sends other bytes than those of {wanted}: their digest is {digest}",
                resolution="the registry, or something on the way to it, is broken; nothing was stored",
            )
        return Fetched(raw, media_type, digest)

    def put_manifest(self, repository: str, reference: str, raw: bytes, media_type: str) -> bool:
        """Store a manifest under a tag or its digest; whether the registry lists it with its subject's referrers.

        Raises Refused when something it names is missing there.
        """
        with self.call(
            "PUT",
            repository,
            f"manifests/{reference}",
            actions="pull,push",
            headers={"Content-Type": media_type},
            body=raw,
            expected=(200, 201, 202),
        ) as response:
            response.drain()
            return "OCI-Subject" in response.headers

    # -- blobs -----------------------------------------------------------------------------------------------------

    def blob(self, repository: str, digest: str, limit: int, what: str) -> bytes:
        """A small blob, verified. Raises RegistryError when it is longer than `limit` bytes or other bytes."""
        _, raw = self._document(repository, f"blobs/{digest}", limit, what)
        if not matches(raw, digest):
            raise RegistryError(f"{self.domain} sends other bytes than those of {what} {digest}")
        return raw

    def has_blob(self, repository: str, digest: str) -> bool:
        """Whether the repository has the blob."""
        try:
            with self.call("HEAD", repository, f"blobs/{digest}", actions="pull,push") as response:
                response.drain()
        except Refused as err:
            if err.status in (404, 405):
                return False
            raise
        return True

    # -- lists -----------------------------------------------------------------------------------------------------

    def tags(self, repository: str) -> list[str]:
        """All tags, page by page."""
        pages = self._pages(repository, "tags/list", "a list of tags")
        return [name for page in pages for name in page.get("tags") or [] if isinstance(name, str)]

    def referrers(self, repository: str, digest: str) -> list[dict[str, Any]]:
        """Descriptors of the artifacts that refer to `digest`; through the tag schema where there is no such API."""
        try:
            pages = list(self._pages(repository, f"referrers/{digest}", "a list of referrers", accept=oci.OCI_INDEX))
        except Refused as err:
            if err.status != 404:
                raise
            try:
                pages = [_json(self.manifest(repository, digest.replace(":", "-", 1)).raw, self.domain)]
            except Refused:
                return []
        return [each for page in pages for each in page.get("manifests") or [] if isinstance(each, dict)]

    def _pages(self, repository: str, path: str, what: str, *, accept: str = "*/*") -> Iterator[dict[str, Any]]:
        """The documents of a list, by its Link headers, of which only the query counts. Raises RegistryError."""
        place, size = path, 0
        for _ in range(_PAGES):
            response, raw = self._document(repository, place, LIST_MAX, what, accept=accept)
            size += len(raw)
            if size > LISTS_MAX:
                raise RegistryError(f"{self.domain} sends {what} of more than {LISTS_MAX} bytes: refused")
            yield _json(raw, self.domain)
            link = _NEXT_LINK.search(response.headers.get("Link", "")[:8192])
            if link is None:
                return
            place = f"{path}?{urlsplit(urljoin(response.url, link[1])).query}"
        raise RegistryError(f"{self.domain} sends {what} of more than {_PAGES} pages: refused")

    def check(self) -> None:
        """Ask for the API's root, with the log-in there is. Raises RegistryError when it is refused."""
        with self.call("GET", "", "", actions="") as response:
            response.drain()

    # -- requests --------------------------------------------------------------------------------------------------

    def _document(
        self, repository: str, path: str, limit: int, what: str, *, accept: str = "*/*"
    ) -> tuple[Response, bytes]:
        """A small document, asked for again when its answer breaks off. Raises RegistryError beyond `limit` bytes."""
        attempt = 0
        while True:
            response = self.call("GET", repository, path, accept=accept)
            try:
                with response:
                    return response, response.read(limit, what)
            except Broken as err:
                attempt = self.broke_off(response, attempt)
                if attempt > self.persistence.retries:
                    raise self._silence(err) from err
                self.pool.pause(self.persistence.pause_s * 2**attempt)

    def broke_off(self, response: Response, attempt: int) -> int:
        """Note that a body broke off for the `attempt`th time; what to count on from. A mirror is not asked again."""
        for site in self._sites:
            if site is response.source and site.endpoint.mirror and attempt >= MIRROR_RETRIES:
                site.broken = True
                return 0
        return attempt + 1

    def call(
        self,
        method: str,
        repository: str,
        path: str,
        *,
        accept: str = "*/*",
        actions: str = "pull",
        mount_from: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: Body = b"",
        size_bytes: int | None = None,
        expected: Sequence[int] = (200,),
        again: bool = True,
    ) -> Response:
        """One request below /v2/, or to an absolute URL in `path` (an upload's Location), and its good answer.

        Raises Refused for any other status, RegistryError when nobody answers, Broken at once when not `again`.
        """
        scope = _scope(repository, actions, mount_from)
        sent = {"Accept": accept, **(headers or {})}
        attempt = 0
        while True:
            told: RegistryError | Broken | None = None
            mirrored: RegistryError | Broken | None = None
            for site in self._candidates():
                where = f"{repository}/{path}" if repository else path
                url = path if "://" in path else f"{site.endpoint.origin}{site.endpoint.prefix}/v2/{where}"
                try:
                    response = self._persist(site, method, url, scope, sent, body, size_bytes, again=again)
                except (Broken, RegistryError) as err:
                    if not self._may_go_on(site, err, again=again):
                        raise
                    if site.endpoint.mirror:
                        mirrored = err
                    else:
                        told = _more_telling(told, err)
                    continue
                if site.endpoint.mirror and response.status >= 400:
                    mirrored = self._refusal(response, repository, path, site)
                    continue
                if not site.answered and _wants_tls(response, site):
                    response.close()
                    told = _more_telling(told, NotHTTP("it wants TLS"))
                    continue
                site.answered = True
                response.source = site
                if response.status not in expected:
                    raise self._refusal(response, repository, path, site)
                return response
            attempt += 1
            told = told or mirrored
            if isinstance(told, RegistryError):
                raise told
            if isinstance(told, (NotHTTP, Unreachable)) or attempt > self.persistence.retries:
                raise self._silence(told)
            # The first answer of all broke off: which of the endpoints is the right one is not known yet.
            self.pool.pause(self.persistence.pause_s * 2**attempt)

    def _may_go_on(self, site: _Site, err: Exception, *, again: bool) -> bool:
        """Whether the next endpoint may be what is wanted, after this one failed with `err`."""
        if site.endpoint.mirror or isinstance(err, (NotHTTP, Unreachable)):
            return True
        return again and isinstance(err, Broken) and not site.answered

    def _candidates(self) -> list[_Site]:
        """Mirrors, then the endpoint that has answered, or all while none has."""
        sites = [site for site in self._sites if not site.broken]
        good = [site for site in sites if site.answered and not site.endpoint.mirror]
        if not good:
            return sites
        return [site for site in sites if site.endpoint.mirror and site.answered] + good

    def _persist(
        self,
        site: _Site,
        method: str,
        url: str,
        scope: str,
        headers: Mapping[str, str],
        body: Body,
        size_bytes: int | None,
        *,
        again: bool,
    ) -> Response:
        """The request with its log-in, tried again while that may help."""
        attempt = 0
        while True:
            pause_s = self.persistence.pause_s * 2**attempt * random.uniform(0.75, 1.25)
            # Behind a mirror there is the registry itself.
            retries = min(self.persistence.retries, MIRROR_RETRIES if site.endpoint.mirror else _ENDLESS)
            tired = attempt >= retries or not again
            attempt += 1
            try:
                response = self._authorized(site, method, url, scope, headers, body, size_bytes)
            except (NotHTTP, Unreachable):
                if not site.answered or tired:
                    raise
            except Broken as err:
                # An endpoint that has never answered may be the wrong one: the next is tried first.
                if not again or (not site.answered and site is not self._sites[-1]):
                    raise
                if tired:
                    raise self._silence(err) from err
            else:
                if response.status not in _AGAIN or tired:
                    return response
                site.answered = True
                asked_s = retry_after(response.headers.get("Retry-After"))
                if asked_s is not None and asked_s > self._longest_wait_s:
                    return response
                if asked_s is not None:
                    pause_s = max(asked_s, pause_s)
                if pause_s >= 2 or response.status == 429:
                    why = "is asked too often" if response.status == 429 else f"answers with status {response.status}"
                    self._notify(f"{self.domain} {why}; trying again in {pause_s:.0f} s")
                response.close()
            self.pool.pause(pause_s)

    def _authorized(
        self,
        site: _Site,
        method: str,
        url: str,
        scope: str,
        headers: Mapping[str, str],
        body: Body,
        size_bytes: int | None,
    ) -> Response:
        # A Location of another host gets no credentials of this one.
        own = urlsplit(url)[:2] == urlsplit(site.endpoint.origin)[:2] or _same_host(url, site.endpoint)
        header = site.authorizer.header(scope) if own else None
        for _ in range(2):
            sent = {**headers, **({"Authorization": header} if header else {})}
            response = self.pool.request(
                method, url, endpoint=site.endpoint, headers=sent, body=body, size_bytes=size_bytes
            )
            if response.status != 401 or not own:
                return response
            site.answered = True  # also when its token service does not
            challenges = parse_challenges(response.headers.get_all("WWW-Authenticate") or [])
            new = site.authorizer.answer(challenges, scope, header)
            if new is None:
                return response
            response.close()
            header = new
        sent = {**headers, "Authorization": header or ""}
        return self.pool.request(method, url, endpoint=site.endpoint, headers=sent, body=body, size_bytes=size_bytes)

    # -- errors ----------------------------------------------------------------------------------------------------

    def _silence(self, err: Exception | None) -> RegistryError:
        reason = str(err.args[0]) if err is not None and err.args else "no answer"
        host = self.endpoint.host
        return RegistryError(
            f"no answer from the registry {self.domain}: {reason}",
            resolution=f"is {host}:{self.endpoint.port} reachable from here? Proxies: HTTPS_PROXY, NO_PROXY",
        )

    def _refusal(self, response: Response, repository: str, path: str, site: _Site) -> Refused:
        code, message = _error_of(response)
        status = response.status
        name = f"{self.domain}/{repository}" if self.domain != DOCKER_DOMAIN else repository.removeprefix("library/")
        kind, _, reference = path.partition("/")
        said = ": ".join(part for part in (code.lower().replace("_", " "), message) if part)
        # A HEAD is answered without words.
        words = said or ("authentication required" if status == 401 else f"status {status}")
        if status == 403 and "quota" in words:
            brief = f"{self.domain} takes no more for {name}: {words}"
            return Refused(
                brief, status=status, code=code, resolution="remove there what is not needed, or raise its quota"
            )
        if status in (401, 403):
            brief = f"access denied for {name}: {words}" if repository else f"{self.domain}: {words}"
            if kind == "manifests":
                brief = (
                    f"pull access denied for {name}, repository does not exist or may require 'docker login': {words}"
                )
            hint = (
                f"`labkernel login {self.domain}`" if site.authorizer.login is None else "check the name and the log-in"
            )
            return Refused(brief, status=status, code=code, resolution=hint)
        if status == 404 and kind == "manifests":
            mark = "@" if oci.is_digest(reference) else ":"
            return Refused(f"manifest for {name}{mark}{reference} not found: {words}", status=status, code=code)
        if status == 404 and kind == "blobs":
            return Refused(f"{name}: {self.domain} does not have {reference}", status=status, code=code)
        if status == 429:
            return self._too_often(response, words)
        return Refused(f"{self.domain} refuses {name}: {words} (status {status})", status=status, code=code)

    def _too_often(self, response: Response, words: str) -> Refused:
        wait_s = retry_after(response.headers.get("Retry-After"))
        limit = re.match(r"(\d+)(?:;w=(\d+))?", response.headers.get("RateLimit-Limit") or "")
        details = None
        if limit:
            window = f" every {int(limit[2]) / 3600:g} hours" if limit[2] else ""
            details = f"it allows {limit[1]} pulls{window} from this address or account"
        when = f"try again in {_minutes(wait_s)}" if wait_s else "try again later"
        return Refused(
            f"{self.domain} takes no more requests from here for now: {words}",
            status=429,
            code="TOOMANYREQUESTS",
            details=details,
            resolution=f"{when}; logged-in users are allowed more (`labkernel login`); a class pulls once through "
            "its own registry (`labkernel registry serve`)",
        )

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exc: object) -> None:
        self.pool.close()


def retry_after(text: str | None) -> float | None:
    """Seconds of a Retry-After header (a number or a date); None without one that makes sense."""
    if not text:
        return None
    if text.strip().isdigit():
        return float(text.strip()[:9])
    from datetime import datetime
    from email.utils import parsedate_to_datetime

    try:
        moment = parsedate_to_datetime(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return max(0.0, (moment - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def matches(raw: bytes, digest: str) -> bool:
    """Whether `raw` has this sha256 or sha512 digest."""
    import hashlib

    algorithm, _, wanted = digest.partition(":")
    return hashlib.new(algorithm, raw).hexdigest() == wanted


def _scope(repository: str, actions: str, mount_from: str | None) -> str:
    """What a token is asked for (Docker's "Token Scope Documentation")."""
    scope = f"repository:{repository}:{actions}" if actions else ""
    return f"{scope} repository:{mount_from}:pull" if mount_from else scope


def _same_host(url: str, endpoint: Endpoint) -> bool:
    # Registries behind a proxy that ends TLS name themselves by http; only the host counts where TLS is not demanded.
    parts = urlsplit(url)
    return parts.hostname == endpoint.host and (parts.scheme == "https" or not (endpoint.secure and endpoint.verify))


def _more_telling(first: RegistryError | Broken | None, second: RegistryError | Broken) -> RegistryError | Broken:
    """Of two failures the one to be told: what a registry said, else that it broke off, else that nothing was there."""
    ranks = [
        3 if isinstance(err, RegistryError) else 1 if isinstance(err, (NotHTTP, Unreachable)) else 2
        for err in (first, second)
        if err is not None
    ]
    return second if first is None or ranks[1] > ranks[0] else first


def _wants_tls(response: Response, site: _Site) -> bool:
    return (
        response.status == 400
        and not site.endpoint.secure
        and response.headers.get("Docker-Distribution-Api-Version") is None
    )


def _error_of(response: Response) -> tuple[str, str]:
    """(code, message) of an error answer, cut to a line; empty where it has none."""
    try:
        with response:
            first = json.loads(response.read(ERROR_MAX))["errors"][0]
        return _line(first.get("code")), _line(first.get("message"))
    except (Broken, RegistryError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", ""


def _line(text: object) -> str:
    return "".join(char if char.isprintable() else " " for char in str(text or ""))[:300].strip()


def _json(raw: bytes, domain: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise RegistryError(f"{domain} answers with something else than JSON")
    return found


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
