"""Limits and rules for single devices: `--device-read-bps`, `--blkio-weight-device`, `--device-cgroup-rule`.

Pure, but for looking up a device's numbers. Sources: Docker documentation,
"docker run"; runtime-spec config-linux.md, "Block IO".
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UsageError

# Setting -> (property of runtime-spec `blockIO`, whether the rate counts bytes)
RATES = {
    "device_read_bps": ("throttleReadBpsDevice", True),
    "device_write_bps": ("throttleWriteBpsDevice", True),
    "device_read_iops": ("throttleReadIOPSDevice", False),
    "device_write_iops": ("throttleWriteIOPSDevice", False),
}
_RULE = re.compile(r"([acb]) ([0-9]+|\*):([0-9]+|\*) ([rwm]{1,3})")


def rates(setting: str) -> Callable[[Any], list[dict[str, Any]]]:
    """A check of `PATH:RATE` words, or the API's {"Path", "Rate"}."""
    flag, in_bytes = f"--{setting.replace('_', '-')}", RATES[setting][1]

    def check(value: Any) -> list[dict[str, Any]]:
        found = []
        for item in [value] if isinstance(value, (str, Mapping)) else value:
            path, rate = (item["Path"], item["Rate"]) if isinstance(item, Mapping) else _pair(item, flag)
            found.append({"Path": _path(path, flag), "Rate": _rate(rate, flag, in_bytes=in_bytes)})
        return found

    return check


def weights(value: Any) -> list[dict[str, Any]]:
    """`PATH:WEIGHT` words, or the API's {"Path", "Weight"}."""
    flag, found = "--blkio-weight-device", []
    for item in [value] if isinstance(value, (str, Mapping)) else value:
        path, weight = (item["Path"], item["Weight"]) if isinstance(item, Mapping) else _pair(item, flag)
        if not str(weight).isdigit() or not 10 <= int(weight) <= 1000:
            raise UsageError(f"invalid weight for device: {path}:{weight}", resolution="a number from 10 to 1000")
        found.append({"Path": _path(path, flag), "Weight": int(weight)})
    return found


def rules(value: Any) -> list[str]:
    """`c 10:229 rwm`, as the device cgroup of version 1 has them."""
    words = [value] if isinstance(value, str) else [str(word) for word in value]
    for word in words:
        if not _RULE.fullmatch(word):
            raise UsageError(f"invalid device cgroup format '{word}'", resolution="--device-cgroup-rule 'c 10:229 rwm'")
    return words


def block_io(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of runtime-spec `blockIO` is about single devices. Raises UsageError for one that is not there."""
    found: dict[str, Any] = {}
    for setting, (name, _) in RATES.items():
        if settings.get(setting):
            found[name] = [{**_numbers(item["Path"]), "rate": item["Rate"]} for item in settings[setting]]
    if settings.get("blkio_weight_device"):
        found["weightDevice"] = [
            {**_numbers(item["Path"]), "weight": item["Weight"]} for item in settings["blkio_weight_device"]
        ]
    return found


def cgroup_rules(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`device_cgroup_rules` as runtime-spec `resources.devices`."""
    found = []
    for word in settings.get("device_cgroup_rules", ()):
        parts = _RULE.fullmatch(word)
        assert parts is not None
        kind, major, minor, access = parts.groups()
        numbers = {name: int(text) for name, text in (("major", major), ("minor", minor)) if text != "*"}
        for each in "cb" if kind == "a" else kind:
            found.append({"allow": True, "type": each, **numbers, "access": access})
    return found


def _pair(item: Any, flag: str) -> tuple[str, str]:
    path, colon, rate = str(item).rpartition(":")
    if not colon or not rate:
        raise UsageError(f'invalid argument "{item}" for "{flag}" flag: bad format: {item}')
    return path, rate


def _path(path: Any, flag: str) -> str:
    if not str(path).startswith("/dev/"):
        raise UsageError(f'invalid argument "{path}" for "{flag}" flag: bad format for device path: {path}')
    return str(path)


def _rate(rate: Any, flag: str, *, in_bytes: bool) -> int:
    from .settings import parse_size

    if not in_bytes and not str(rate).isdigit():
        raise UsageError(f'invalid argument "{rate}" for "{flag}" flag: the rate must be a positive number')
    number = parse_size(rate) if in_bytes else int(rate)
    if number <= 0:
        raise UsageError(f'invalid argument "{rate}" for "{flag}" flag: the rate must be a positive number')
    return number


def _numbers(path: str) -> dict[str, int]:
    try:
        info = os.stat(path)
    except OSError as err:
        raise UsageError(f"cannot limit the device {path}: {(err.strerror or '').lower()}") from None
    if not stat.S_ISBLK(info.st_mode):
        raise UsageError(f"cannot limit {path}: it is no block device")
    return {"major": os.major(info.st_rdev), "minor": os.minor(info.st_rdev)}
