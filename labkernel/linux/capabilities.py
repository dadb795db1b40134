"""Capability sets by name. Source: man 7 capabilities, linux/capability.h."""

from __future__ import annotations

from .syscalls import PR_CAP_AMBIENT, PR_CAPBSET_DROP, PR_CAPBSET_READ, capget, capset, prctl

NAMES = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
]
_NUMBERS = {name: number for number, name in enumerate(NAMES)}
_PR_CAP_AMBIENT_RAISE = 2
_PR_CAP_AMBIENT_CLEAR_ALL = 4


def mask(names: list[str]) -> int:
    """The bit mask of capability names; names this kernel header does not know count as nothing."""
    bits = 0
    for name in names:
        number = _NUMBERS.get(name.upper())
        if number is not None:
            bits |= 1 << number
    return bits


def names(bits: int) -> list[str]:
    """The names in a bit mask."""
    return [name for number, name in enumerate(NAMES) if bits >> number & 1]


def effective() -> list[str]:
    """What this process may do now."""
    return names(capget()[0])


def drop_bounding(keep: int) -> None:
    """Take everything but `keep` out of the bounding set. Needs CAP_SETPCAP."""
    for number in range(64):
        if keep >> number & 1:
            continue
        try:
            prctl(PR_CAPBSET_DROP, number)
        except OSError:
            # EINVAL: past the last capability of this kernel. EPERM: no CAP_SETPCAP, then the bit must be gone already.
            if number < len(NAMES) and bounding_has(number):
                raise
            if number >= len(NAMES):
                return


def bounding_has(number: int) -> bool:
    """Whether capability `number` is in the bounding set; False for one this kernel does not know."""
    try:
        return prctl(PR_CAPBSET_READ, number) == 1
    except OSError:
        return False


def apply(sets: dict[str, list[str]], *, allowed: int | None = None) -> None:
    """Set effective, permitted, inheritable and ambient (runtime-spec `process.capabilities`); bounding is separate.

    A process can only keep what it has: names outside the permitted set are left out, as crun does.
    """
    have = capget()[1] if allowed is None else allowed
    permitted = mask(sets.get("permitted", [])) & have
    inheritable = mask(sets.get("inheritable", []))
    capset(mask(sets.get("effective", [])) & permitted, permitted, inheritable)
    prctl(PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    ambient = mask(sets.get("ambient", [])) & permitted & inheritable
    for number in range(len(NAMES)):
        if ambient >> number & 1:
            prctl(PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number)
