"""Limits of control groups as data: from the runtime-spec's words to what is written to which file. Pure.

Sources: runtime-spec config-linux.md, "Control groups"; kernel Documentation admin-guide/cgroup-v1 and
admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

from collections.abc import Iterable

# What a container may do with devices, as runc and crun have it: make any node, use only these. (runtime-spec
# config-linux.md, "Allowed Device list")
DEVICE_RULES: list[dict[str, object]] = [
    {"allow": False, "access": "rwm"},
    {"allow": True, "type": "c", "access": "m"},
    {"allow": True, "type": "b", "access": "m"},
    *(
        {"allow": True, "type": "c", "major": major, "minor": minor, "access": "rwm"}
        for major, minor in ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2))
    ),
    {"allow": True, "type": "c", "major": 136, "access": "rwm"},
]

# Property of `blockIO`, docker's flag, file of version 1, word of io.max in version 2.
_RATES = (
    ("throttleReadBpsDevice", "device-read-bps", "blkio.throttle.read_bps_device", "rbps"),
    ("throttleWriteBpsDevice", "device-write-bps", "blkio.throttle.write_bps_device", "wbps"),
    ("throttleReadIOPSDevice", "device-read-iops", "blkio.throttle.read_iops_device", "riops"),
    ("throttleWriteIOPSDevice", "device-write-iops", "blkio.throttle.write_iops_device", "wiops"),
)

# Controllers that version 2 calls otherwise.
V2_NAMES = {"blkio": "io"}


def translate(resources: dict[str, dict[str, object]], *, version: int) -> list[tuple[str, str, str, str]]:
    """Runtime-spec resources -> writes, in order: (controller, file name, value, setting). Pure."""
    plan = _plan_v2 if version == 2 else _plan_v1
    return [(where, name, value, setting) for setting, where, name, value in plan(_Settings(resources))]


def device_rule(rule: dict[str, object]) -> str:
    """A rule of `resources.devices` as the v1 files have it: `c 1:3 rwm`, `a *:* rwm`."""
    kind = str(rule.get("type") or "a")
    major, minor = rule.get("major"), rule.get("minor")
    numbers = ":".join("*" if number is None or number == -1 else str(number) for number in (major, minor))
    return f"{kind} {numbers} {rule.get('access') or 'rwm'}"


def device_changes(listed: Iterable[str], rules: list[dict[str, object]]) -> list[tuple[str, str]]:
    """What makes the lines of a v1 `devices.list` those of `rules`: (`devices.allow` or `devices.deny`, line) each.

    Only what differs: whoever starts with "deny all" takes /dev/null, for a moment, from the processes that are in the
    group already. A group that allows everything, or rules that deny single devices, leave no other way."""
    there, wanted = _accesses(listed), _accesses(device_rule(rule) for rule in rules if rule.get("allow"))
    if "a *:*" in there or not rules or rules[0].get("allow") or not all(rule.get("allow") for rule in rules[1:]):
        return [(f"devices.{'allow' if rule.get('allow') else 'deny'}", device_rule(rule)) for rule in rules]
    return [
        (name, f"{device} {''.join(letter for letter in 'rwm' if letter in letters - theirs.get(device, set()))}")
        for name, ours, theirs in (("devices.allow", wanted, there), ("devices.deny", there, wanted))
        for device, letters in ours.items()
        if letters - theirs.get(device, set())
    ]


def _accesses(lines: Iterable[str]) -> dict[str, set[str]]:
    """`c 1:3` -> the letters of `rwm` that are allowed."""
    found: dict[str, set[str]] = {}
    for line in lines:
        device, _, access = line.rpartition(" ")
        found.setdefault(device, set()).update(access)
    return found


class _Settings:
    """Reading access to nested runtime-spec values, None when absent."""

    __slots__ = ("_resources",)

    def __init__(self, resources: dict[str, dict[str, object]]) -> None:
        self._resources = resources

    def number(self, controller: str, name: str) -> int | None:
        value = (self._resources.get(controller) or {}).get(name)
        return None if value is None else int(str(value))

    def text(self, controller: str, name: str) -> str | None:
        value = (self._resources.get(controller) or {}).get(name)
        return str(value) if value else None

    def devices(self, name: str, what: str) -> list[tuple[str, int]]:
        """("MAJOR:MINOR", value) of a list in `blockIO`."""
        items = (self._resources.get("blockIO") or {}).get(name) or []
        assert isinstance(items, list)
        return [(f"{item['major']}:{item['minor']}", int(item[what])) for item in items]

    def raw(self) -> dict[str, object]:
        return self._resources.get("unified") or {}


def _plan_v1(settings: _Settings) -> list[tuple[str, str, str, str]]:
    plan = [
        ("memory", "memory", "memory.limit_in_bytes", settings.number("memory", "limit")),
        ("memory-reservation", "memory", "memory.soft_limit_in_bytes", settings.number("memory", "reservation")),
        # memory.memsw below memory.limit is EINVAL, so it comes second
        ("memory-swap", "memory", "memory.memsw.limit_in_bytes", settings.number("memory", "swap")),
        ("memory-swappiness", "memory", "memory.swappiness", settings.number("memory", "swappiness")),
        ("cpu-shares", "cpu", "cpu.shares", settings.number("cpu", "shares")),
        ("cpu-period", "cpu", "cpu.cfs_period_us", settings.number("cpu", "period")),
        ("cpus", "cpu", "cpu.cfs_quota_us", settings.number("cpu", "quota")),
        ("cpuset-cpus", "cpuset", "cpuset.cpus", settings.text("cpu", "cpus")),
        ("cpuset-mems", "cpuset", "cpuset.mems", settings.text("cpu", "mems")),
        ("blkio-weight", "blkio", "blkio.weight", settings.number("blockIO", "weight")),
    ]
    writes = [(setting, where, name, str(value)) for setting, where, name, value in plan if value is not None]
    if settings.number("memory", "disableOOMKiller"):
        writes.append(("oom-kill-disable", "memory", "memory.oom_control", "1"))
    for key, setting, name, _ in _RATES:
        writes += [(setting, "blkio", name, f"{device} {rate}") for device, rate in settings.devices(key, "rate")]
    weights = settings.devices("weightDevice", "weight")
    writes += [("blkio-weight-device", "blkio", "blkio.weight_device", f"{dev} {weight}") for dev, weight in weights]
    pids = settings.number("pids", "limit")
    if pids is not None:
        writes.append(("pids-limit", "pids", "pids.max", str(pids) if pids > 0 else "max"))
    return writes


def _plan_v2(settings: _Settings) -> list[tuple[str, str, str, str]]:
    def amount(value: int) -> str:
        return str(value) if value >= 0 else "max"

    writes: list[tuple[str, str, str, str]] = []
    limit, swap = settings.number("memory", "limit"), settings.number("memory", "swap")
    reservation = settings.number("memory", "reservation")
    if limit is not None:
        writes.append(("memory", "memory", "memory.max", amount(limit)))
    if reservation is not None:
        writes.append(("memory-reservation", "memory", "memory.low", amount(reservation)))
    if swap is not None:  # runtime-spec: memory and swap together; v2: swap alone
        writes.append(
            ("memory-swap", "memory", "memory.swap.max", amount(swap if swap < 0 else max(0, swap - (limit or 0))))
        )
    shares = settings.number("cpu", "shares")
    if shares:
        writes.append(("cpu-shares", "cpu", "cpu.weight", str(weight_of_shares(shares))))
    quota, period = settings.number("cpu", "quota"), settings.number("cpu", "period")
    if quota is not None or period is not None:
        words = "max" if quota is None or quota < 0 else str(quota)
        writes.append(("cpus", "cpu", "cpu.max", f"{words} {period or 100000}"))
    for setting, name in (("cpus", "cpuset.cpus"), ("mems", "cpuset.mems")):
        text = settings.text("cpu", setting)
        if text:
            writes.append((f"cpuset-{setting}", "cpuset", name, text))
    pids = settings.number("pids", "limit")
    if pids is not None:
        writes.append(("pids-limit", "pids", "pids.max", str(pids) if pids > 0 else "max"))
    weight = settings.number("blockIO", "weight")
    if weight:
        writes.append(("blkio-weight", "blkio", "io.weight", str(1 + (weight - 10) * 9999 // 990)))
    if settings.number("memory", "disableOOMKiller"):
        writes.append(("oom-kill-disable", "memory", "memory.oom_control", "1"))  # version 2 has no such file
    for key, setting, _, word in _RATES:
        writes += [(setting, "blkio", "io.max", f"{dev} {word}={rate}") for dev, rate in settings.devices(key, "rate")]
    weights = settings.devices("weightDevice", "weight")
    writes += [("blkio-weight-device", "blkio", "io.weight", f"{device} {weight}") for device, weight in weights]
    writes += [("unified", name.split(".")[0], name, str(value)) for name, value in settings.raw().items()]
    return writes


def weight_of_shares(shares: int) -> int:
    """v1 cpu.shares (2 … 262144) on v2's scale (1 … 10000), linearly, as the runtime-spec's implementations do."""
    shares = min(max(shares, 2), 262144)
    return 1 + (shares - 2) * 9999 // 262142
