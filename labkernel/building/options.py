"""What can be said of a build beside its Dockerfile and its names. Pure; what is read for it is the caller's work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .devices import allowed_device

if TYPE_CHECKING:
    from .remotecache import CachePlace

ENTITLEMENTS = ("network.host", "security.insecure", "device")
LIMITS = (
    *("memswap_limit", "shm_size", "ulimits", "cpu_shares", "cpu_period", "cpu_quota", "cpuset_cpus", "cpuset_mems"),
)


@dataclass(frozen=True)
class BuildOptions:
    """What is less often said about a build. `secrets`: id -> bytes; `ssh`: id -> path of an agent's socket, or of one
    or more private keys (agents.py); `allow`: entitlements; `extra_hosts`: name:address; `cache_from` and
    `cache_to`: directories or CachePlaces (remotecache.py); `memory_bytes`: limit of a RUN, 0 for none;
    `limits`: others of a RUN, named as those of a container (LIMITS);
    `context_epoch_s`: what SOURCE_DATE_EPOCH=context means (epoch.py); `no_cache_filter`: names or numbers of stages;
    `contexts`: name -> image (or its id) that a FROM, --from or from= of that name means, before any stage or image;
    `platform`: `os/arch[/variant]`, or several with commas between (targets.py); `stopping`: called at the
    start with what stops the build, from any thread."""

    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    ssh: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    allow: Sequence[str] = ()
    no_cache_filter: Sequence[str] = ()
    pull: bool = False
    extra_hosts: Sequence[str] = ()
    memory_bytes: int = 0
    limits: Mapping[str, Any] = field(default_factory=dict)
    platform: str | None = None
    contexts: Mapping[str, str] = field(default_factory=dict)
    context_epoch_s: int | None = None
    cache_from: Sequence[str | Path | CachePlace] = ()
    cache_to: str | Path | CachePlace | Sequence[CachePlace] | None = None
    stopping: Callable[[Callable[[], None]], None] | None = None

    def with_fields(self, given: Mapping[str, Any]) -> BuildOptions:
        known = {item.name for item in fields(self)}
        wrong = sorted(set(given) - known)
        if wrong:
            raise TypeError(f"build() got an unexpected keyword argument {wrong[0]!r}")
        return replace(self, **given)

    def check(self) -> None:
        """Raises UsageError for what this machine or this release cannot do."""
        for name in self.limits:
            if name not in LIMITS:
                raise UsageError(f"not a limit of build steps: {name}", resolution=f"one of {', '.join(LIMITS)}")
        for name in self.allow:
            if name.startswith("device="):
                allowed_device(name)
            elif name not in ENTITLEMENTS:
                known = f"{', '.join(ENTITLEMENTS)} (or device=VENDOR/CLASS=NAME)"
                raise UsageError(f"invalid entitlement: {name}", resolution=f"one of {known}")
