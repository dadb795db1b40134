"""docker's flags of `run` and `create` for health checks, logs and single resources."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from ..errors import UsageError
from .grammar import flag, many, option


def absent(*names: str, why: str, metavar: str = "value") -> Callable[[Any], Any]:
    """A flag docker has and this release has not: a clear error instead of `unknown flag`."""

    def refuse(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value:
            raise UsageError(f"{param.opts[0]}: not in this release of labkernel", resolution=why)

    def decorate(function: Any) -> Any:
        short = [name for name in names if not name.startswith("--")]
        for name in (name for name in names if name not in short):
            spellings = [name, *short] if name == names[-1] else [name]
            function = click.option(
                *spellings, multiple=True, metavar=metavar, hidden=True, expose_value=False, callback=refuse
            )(function)
        return function

    return decorate


# Of containers, and of the containers a build runs its steps in.
SHARED: list[Callable[[Any], Any]] = [
    option("--memory-swap", metavar="bytes", help="Memory plus swap: -1 for unlimited swap"),
    option("-c", "--cpu-shares", metavar="int", type=int, help="CPU shares (relative weight)"),
    option("--cpu-quota", metavar="int", type=int, help="CPU time per period, in microseconds"),
    option("--cpu-period", metavar="int", type=int, help="Length of the CPU period, in microseconds"),
    option("--cpuset-cpus", metavar="string", help="CPUs in which to allow execution (0-3, 0,1)"),
    option("--cpuset-mems", metavar="string", help="MEMs in which to allow execution (0-3, 0,1)"),
]
FLAGS: list[Callable[[Any], Any]] = [
    many("--blkio-weight-device", help="Block IO weight of a device (relative weight, path:weight)"),
    many("--device-read-bps", help="Limit read rate (bytes per second) from a device (path:rate)"),
    many("--device-write-bps", help="Limit write rate (bytes per second) to a device (path:rate)"),
    many("--device-read-iops", help="Limit read rate (IO per second) from a device (path:rate)"),
    many("--device-write-iops", help="Limit write rate (IO per second) to a device (path:rate)"),
    many("--device-cgroup-rule", help="Add a rule to the cgroup allowed devices list ('c 10:229 rwm')"),
    option("--cgroup-parent", metavar="string", help="Optional parent cgroup for the container"),
    flag("--oom-kill-disable", help="Disable the kernel's out-of-memory killer for it (cgroup version 1)"),
    many("--annotation", help="Add an annotation to the container (passed through to the OCI runtime)"),
    option("--volume-driver", metavar="string", help="Volume driver for the container (local)"),
    option("--runtime", metavar="string", help="Runtime to use for this container (labkernel)"),
    flag("-q", "--quiet", help="Suppress the pull output"),
    flag("--count-denials", help="Count the system calls its filter denies (inspect shows them)"),
    flag("--rootfs", help="The first argument is not an image but a root file system (DIR, or DIR:O to write over it)"),
    flag("--disable-content-trust", help="Skip image verification", default=True),
    absent("--cpu-rt-period", "--cpu-rt-runtime", why="this kernel's real-time scheduler has no groups"),
    absent("--cpu-count", "--cpu-percent", "--io-maxbandwidth", "--io-maxiops", "--isolation", why="for Windows only"),
    absent("--kernel-memory", why="the kernel dropped it: --memory counts the kernel's memory, too"),
    absent("--storage-opt", why="a size limit needs xfs with project quotas; --tmpfs DIR:size=… bounds a directory"),
    absent("--use-api-socket", why="labkernel daemon -H unix://PATH, then -v PATH:/var/run/docker.sock"),
    option("--health-cmd", metavar="string", help="Command to run to check health"),
    option("--health-interval", metavar="duration", help="Time between running the check (ms|s|m|h) (default 30s)"),
    option("--health-timeout", metavar="duration", help="Maximum time to allow one check to run (default 30s)"),
    option("--health-retries", metavar="int", type=int, help="Consecutive failures needed to report unhealthy"),
    option("--health-start-period", metavar="duration", help="Time the container has before failures count"),
    option("--health-start-interval", metavar="duration", help="Time between checks during the start period"),
    flag("--no-healthcheck", help="Disable any container-specified HEALTHCHECK"),
    option("--log-driver", metavar="string", help="Logging driver for the container (json-file, local, none)"),
    many("--log-opt", help="Log driver options (max-size=10m, max-file=3, labels=…, env=…)"),
]
