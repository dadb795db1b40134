"""Filters: what the profile says, what the kernel then does, and how that compares with another installation's data."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from labkernel.errors import UsageError
from labkernel.linux import seccomp
from labkernel.linux.seccomp_default import RECENT
from labkernel.runtime.spec import DEFAULT_CAPABILITIES

OTHERS = Path("/usr/share/containers/seccomp.json")

pytestmark = pytest.mark.skipif(seccomp.library_version() is None, reason="libseccomp is not installed")
x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers below are those of x86_64")

# Calls with arguments that the kernel itself refuses or that do no harm, since some filters let them through:
# CLONE_NEWUSER with CLONE_FS, for one, is EINVAL.
NUMBERS = {
    "getpid": (39,),
    "socket unix": (41, 1, 1, 0),
    "socket vsock": (41, 40, 1, 0),
    "clone newuser": (56, 0x10000200 | 17, 0, 0, 0, 0),
    "personality 0xffffffff": (135, 0xFFFFFFFF),
    "personality addr_no_randomize": (135, 0x0040000),
    "mount": (165, 0, 0, 0, 0, 0),
    "umount2": (166, 0, 0),
    "unshare": (272, 0x10000000),
    "setns": (308, -1, 0),
    "kexec_load": (246, 0, 0, 0, 0),
    "keyctl": (250, 0, 0),
    "bpf": (321, 0, 0, 0),
    "userfaultfd": (323, 0),
    "io_uring_setup": (425, 1, 0),
    "clone3": (435, 0, 0),
    "fchmodat2": (452, -100, 0, 0, 0),
    "future": (1000,),
    "x32 getpid": (39 | 0x40000000,),
}


def test_the_library_is_found_where_there_is_no_cache_of_libraries() -> None:
    """A small image has neither ldconfig's cache nor a compiler; the filter must not be left out for that."""
    script = (
        "import ctypes.util; ctypes.util.find_library = lambda name: 'libc.so.6' if name == 'c' else None\n"
        "from labkernel.linux import seccomp\n"
        "print(seccomp.call_name('0'), ctypes.util.find_library('seccomp'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    name, afterwards = done.stdout.rsplit(None, 1)
    assert not name.startswith("system call")  # what it says of any number when there is no library
    assert afterwards == "None"


def answers(program: bytes) -> dict[str, int]:
    """errno of each call in a child under the filter; 0 for success, -1 for a child that was killed."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(38, 1, 0, 0, 0)
        seccomp.install(program)
        found = {}
        for name, (number, *args) in NUMBERS.items():
            result = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(arg) for arg in args))
            found[name] = ctypes.get_errno() if result == -1 else 0
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    found: dict[str, int] = json.loads(text)
    return found


@x86
def test_verdicts_of_the_default_profile() -> None:
    found = answers(seccomp.compile(seccomp.docker_profile(DEFAULT_CAPABILITIES)))
    assert found["getpid"] == 0
    assert found["socket unix"] == 0
    assert found["personality 0xffffffff"] == 0
    refused = ["socket vsock", "clone newuser", "personality addr_no_randomize", "mount", "umount2", "unshare", "setns"]
    refused += ["kexec_load", "keyctl", "bpf", "userfaultfd", "io_uring_setup"]
    assert {name: found[name] for name in refused} == dict.fromkeys(refused, errno.EPERM)
    assert found["clone3"] == errno.ENOSYS
    assert found["future"] == errno.ENOSYS
    assert found["fchmodat2"] not in (errno.EPERM,)


@x86
def test_a_capability_opens_its_calls() -> None:
    found = answers(seccomp.compile(seccomp.docker_profile([*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN"])))
    # what is left is the kernel's own answer: a null path, a bad descriptor
    assert found["mount"] == errno.EFAULT
    assert found["setns"] == errno.EBADF
    assert found["clone3"] == errno.EINVAL


def test_recent_numbers_do_not_clash() -> None:
    assert len(set(RECENT.values())) == len(RECENT)
    assert min(RECENT.values()) > 424


@pytest.mark.skipif(not OTHERS.exists(), reason="no other container tools are installed here")
def test_allows_about_what_others_allow() -> None:
    ours = {
        name
        for rule in seccomp.docker_profile(DEFAULT_CAPABILITIES)["syscalls"]  # type: ignore[attr-defined]
        if rule["action"] == "SCMP_ACT_ALLOW"
        for name in rule["names"]
    }
    theirs = {
        name
        for rule in seccomp.load_profile(str(OTHERS), DEFAULT_CAPABILITIES)["syscalls"]  # type: ignore[attr-defined]
        if rule["action"] == "SCMP_ACT_ALLOW"
        for name in rule["names"]
    }
    # Podman's profile lets namespaces and mounts through (it runs containers in containers); Docker's does not.
    namespaces = {"clone3", "fsconfig", "fsmount", "fsopen", "fspick", "mount", "mount_setattr", "move_mount"}
    namespaces |= {"open_tree", "setns", "umount", "umount2", "unshare", "pivot_root"}
    memory = {"get_mempolicy", "mbind", "set_mempolicy"}
    others = {"keyctl", "pidfd_getfd", "readdir", "reboot", "sigaction", "signal", "sigpending", "sigsuspend"}
    others |= {"syscall", "syslog", "timerfd"}
    assert theirs - ours <= namespaces | memory | others
    newer = set(RECENT)
    assert ours - theirs <= newer | {"io_pgetevents", "io_pgetevents_time64", "riscv_hwprobe", "uretprobe", "vmsplice"}


def test_program_is_kept(tmp_path: Path) -> None:
    profile = seccomp.docker_profile(DEFAULT_CAPABILITIES)
    first = seccomp.cached_program(profile, str(tmp_path))
    before = os.stat(first).st_mtime_ns
    assert seccomp.cached_program(profile, str(tmp_path)) == first
    assert os.stat(first).st_mtime_ns == before
    other = seccomp.cached_program(seccomp.docker_profile(["CAP_SYS_ADMIN"]), str(tmp_path))
    assert other != first
    assert len(os.listdir(tmp_path)) == 2


@x86
def test_profile_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    rules = [{"names": ["keyctl"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
    rules.append({"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_BPF"]}})  # type: ignore[dict-item]
    path.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
    found = answers(seccomp.compile(seccomp.load_profile(str(path), [])))
    assert found["keyctl"] == 38
    assert found["bpf"] == errno.EPERM
    assert len(seccomp.load_profile(str(path), ["CAP_BPF"])["syscalls"]) == 1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "Decoding seccomp profile failed"),
        ("[]", "has no defaultAction"),
        ('{"defaultAction": "SCMP_ACT_DANCE"}', "unknown or unsupported action"),
        (
            '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_KILL", '
            '"args": [{"index": 0, "op": "SCMP_CMP_NEAR", "value": 1}]}]}',
            "unknown operator",
        ),
    ],
)
def test_bad_profiles(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=words):
        seccomp.compile(seccomp.load_profile(str(path), []))


def test_missing_profile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="opening seccomp profile"):
        seccomp.load_profile(str(tmp_path / "none.json"))


def test_install_refuses_what_is_no_program() -> None:
    with pytest.raises(OSError, match="not a BPF program"):
        seccomp.install(b"abc")
