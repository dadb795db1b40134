"""Image references: `[domain/]path[:tag][@digest]`, parsed and normalised as Docker does.

`busybox` means `docker.io/library/busybox:latest`; `familiar` is the way back. Error texts are those that docker
clients know. Source: the grammar of distribution's `reference` package (distribution-spec, *name*, *reference*, *tag*);
nothing here knows which images exist.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from labkernel.errors import InvalidReference

DEFAULT_DOMAIN = "docker.io"
DEFAULT_TAG = "latest"

_LEGACY_DOMAIN = "index.docker.io"
_OFFICIAL = "library/"
_PATH_MAX = 255

_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_LABEL = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_DOMAIN = rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
_REFERENCE = re.compile(
    rf"(?:(?P<domain>{_DOMAIN})/)?(?P<path>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?"
    r"(?:@(?P<digest>[A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{32,}))?"
)
_IDENTIFIER = re.compile(r"[a-f0-9]{64}")
_DIGEST_SIZES = {"sha256": 64, "sha384": 96, "sha512": 128}
_HINT = "an image is named like busybox, lab/debian:latest or registry.example.org:5000/course/web@sha256:…"


class Reference(NamedTuple):
    """A normalised reference: domain and path are always there, tag and digest may both be None.

    `str()` gives the canonical form (`docker.io/library/busybox:1.36`).
    """

    domain: str
    path: str
    tag: str | None = None
    digest: str | None = None

    @property
    def name(self) -> str:
        """Domain and path: `docker.io/library/busybox`."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_name(self) -> str:
        """The shortest name that means the same: `busybox`."""
        if self.domain != DEFAULT_DOMAIN:
            return self.name
        short = self.path.removeprefix(_OFFICIAL)
        return self.path if "/" in short else short

    @property
    def familiar(self) -> str:
        """As `docker images` would name it: `busybox:1.36`, `busybox@sha256:…`."""
        return self.familiar_name + self._suffix()

    def with_default_tag(self) -> Reference:
        """This reference, with `:latest` where it has neither tag nor digest."""
        return self if self.tag or self.digest else self._replace(tag=DEFAULT_TAG)

    def __str__(self) -> str:
        return self.name + self._suffix()

    def _suffix(self) -> str:
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def parse(text: str) -> Reference:
    """The reference a user typed, normalised but without a default tag. Raises InvalidReference in docker's words."""
    if _IDENTIFIER.fullmatch(text):
        raise _invalid(f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings")
    domain, rest = _split_domain(text)
    remote = rest.partition(":")[0]
    if remote != remote.lower():
        raise _invalid(f"invalid reference format: repository name ({remote}) must be lowercase")
    match = _REFERENCE.fullmatch(f"{domain}/{rest}")
    if match is None:
        raise _invalid("invalid reference format")
    if len(match["path"]) > _PATH_MAX:
        raise _invalid(f"repository name must not be more than {_PATH_MAX} characters")
    if match["digest"]:
        _check_digest(match["digest"])
    # The expression may read a first component without a dot as part of the path; the split above decides.
    whole = match["path"] if match["domain"] is None else f"{match['domain']}/{match['path']}"
    return Reference(domain, whole.removeprefix(f"{domain}/"), match["tag"], match["digest"])


def parse_tag(text: str) -> Reference:
    """A reference to be used as a name for an image: `:latest` is filled in, a digest is refused."""
    reference = parse(text)
    if reference.digest:
        raise _invalid("refusing to create a tag with a digest reference")
    return reference.with_default_tag()


def _split_domain(text: str) -> tuple[str, str]:
    first, slash, rest = text.partition("/")
    if not slash:
        return DEFAULT_DOMAIN, _OFFICIAL + text
    if first == _LEGACY_DOMAIN:
        first = DEFAULT_DOMAIN
    elif first != "localhost" and not set(first) & {".", ":"} and first == first.lower():
        # Without a dot, a port or a capital the first component is a name on Docker Hub, not a host.
        return DEFAULT_DOMAIN, text
    if first == DEFAULT_DOMAIN and "/" not in rest:
        rest = _OFFICIAL + rest
    return first, rest


def _check_digest(digest: str) -> None:
    algorithm, _, encoded = digest.partition(":")
    size = _DIGEST_SIZES.get(algorithm)
    if size is None:
        raise _invalid("unsupported digest algorithm")
    if len(encoded) != size:
        raise _invalid("invalid checksum digest length")
    if encoded != encoded.lower():
        raise _invalid("invalid checksum digest format")


def _invalid(brief: str) -> InvalidReference:
    return InvalidReference(brief, resolution=_HINT)
