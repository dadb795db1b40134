"""Docker's filters over images: which of a list are meant. Source: Docker Engine API, ImageList and ImagePrune."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InvalidFilter
from ..oci.reference import Reference, parse

if TYPE_CHECKING:
    from ..images import Images
    from .image import Image

Test = Callable[["Image", Sequence[Reference]], bool]

_NAMES = ("before", "dangling", "label", "label!", "reference", "since", "until")


def make_test(images: Images, filters: Mapping[str, Any] | None, *, patterns: Sequence[str] = ()) -> Test:
    """A test of an image and its tags for all of `filters`; `patterns` are more words for `reference`.

    Values come as one word, several, or the API's `{"value": true}`. Raises UsageError for an unknown filter or value,
    NoSuchImage for `before` and `since`.
    """
    given = {key: words(value) for key, value in (filters or {}).items()}
    for key in given:
        if key not in _NAMES:
            raise InvalidFilter(f"invalid filter '{key}'", resolution=f"the filters are {', '.join(_NAMES)}")
    wanted = [*given.get("reference", ()), *patterns]
    dangling = is_true("dangling", given["dangling"]) if given.get("dangling") else None
    labels = [word.partition("=") for word in given.get("label", ())]
    unwanted = [word.partition("=") for word in given.get("label!", ())]
    earlier = [images.get(word).created for word in given.get("before", ())] + _moments(given.get("until", ()))
    later = [images.get(word).created for word in given.get("since", ())]

    def test(image: Image, tags: Sequence[Reference]) -> bool:
        if wanted and not any(_matches(tag, pattern) for tag in tags for pattern in wanted):
            return False
        if dangling is not None and dangling is bool(tags):
            return False
        if any(image.created >= moment for moment in earlier) or any(image.created <= moment for moment in later):
            return False
        has = image.labels if labels or unwanted else {}
        fits = all(key in has and (not equals or has[key] == value) for key, equals, value in labels)
        return fits and not any(key in has and (not equals or has[key] == value) for key, equals, value in unwanted)

    return test


def words(value: Any) -> list[str]:
    """A filter's values: one, several, or the API's {"value": true}."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [str(key) for key, on in value.items() if on]
    return [str(word) for word in value] if isinstance(value, (list, tuple, set)) else [str(value)]


def is_true(name: str, values: Sequence[str]) -> bool:
    """The truth a filter's word means. Raises UsageError for another word."""
    word = values[0].lower()
    if word not in {"true", "false", "1", "0"}:
        raise InvalidFilter(f"invalid filter '{name}={word}'", resolution=f"{name} is true or false")
    return word in {"true", "1"}


def _moments(values: Sequence[str]) -> list[float]:
    if not values:
        return []
    from ..runtime.logreader import parse_moment

    return [parse_moment(value) for value in values]


def is_meant(name: str, patterns: Sequence[str]) -> bool:
    """Whether an image's name is one that `reference=` filters ask for."""
    return any(_matches(parse(name), pattern) for pattern in patterns)


def _matches(tag: Reference, pattern: str) -> bool:
    """docker's `reference=` filter: a pattern on the name, or on name and tag."""
    names = (tag.familiar_name, tag.familiar, tag.name, str(tag))
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
