"""lab/debian out of Debian packages: apt resolves and downloads (as any user), we merge the packages into one tar.

No chroot and no maintainer scripts: what those would make and a container needs (accounts, merged-/usr links, the
alternatives of awk, …) is written here. The machine's own package sources and keys are used, its package state is not:
apt runs with an empty one, so that it names the whole closure of what the base wants.
"""

from __future__ import annotations

import importlib.util
import io
import marshal
import os
import re
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Protocol

from ..errors import DISK_FULL_HINT, DiskFull, ImageError

BASE_PACKAGES = (
    *("base-files", "base-passwd", "bash", "coreutils", "dash", "debianutils", "diffutils", "findutils", "grep"),
    *("gzip", "hostname", "libc-bin", "libpython3-stdlib", "mawk", "ncurses-base", "procps", "python3-minimal"),
    *("sed", "tar", "usr-is-merged", "util-linux"),
)
# Dependencies that only serve installing more packages; nothing in the base runs them.
_LEFT_OUT = ("debconf", "dpkg", "perl-base", "usrmerge", "libaudit-common")
_NO_FILES = (
    *("usr/share/doc/", "usr/share/man/", "usr/share/info/", "usr/share/lintian/", "usr/share/locale/"),
    *("usr/share/menu/", "usr/share/bug/", "usr/share/bash-completion/", "usr/share/doc-base/"),
)
# Directories that are links into /usr since Debian 12 (merged-/usr).
_MERGED = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# Python compiles its library in postinst, which does not run here; importing from source costs each fresh container
# (and each VM, fifteen times over) 130 ms more for `import json, subprocess`. These modules are compiled by us.
_MODULES = (
    "__future__ _collections_abc _compat_pickle _compression _weakrefset abc argparse ast asyncio base64 bisect bz2 "
    "calendar codecs collections concurrent contextlib contextvars copy copyreg csv ctypes dataclasses datetime "
    "decimal dis email encodings enum fnmatch fractions functools genericpath gettext glob hashlib heapq hmac html "
    "http importlib inspect io ipaddress json keyword linecache locale logging lzma mimetypes multiprocessing ntpath "
    "numbers opcode operator os pathlib pickle platform posixpath pprint queue quopri random re reprlib runpy "
    "selectors shlex shutil signal site socket socketserver ssl stat statistics string stringprep struct subprocess "
    "tarfile tempfile textwrap threading timeit token tokenize traceback types typing urllib uuid warnings weakref "
    "zipfile"
)
_COMPILED = frozenset(_MODULES.split())
_LIBRARY = re.compile(r"usr/lib/python(3\.\d+)/(\w+)(?:/\w+)*\.py")
_HINT = "check the machine's package sources (`apt-get update`), or use lab/busybox"
_TIMEOUT_S = 600.0


class Sink(Protocol):
    def write(self, data: bytes, /) -> int: ...


def fetch_base(work: Path) -> list[Path]:
    """Download the base's packages with all they need into `work`; sorted by name. Raises ImageError, DiskFull."""
    wanted = list(BASE_PACKAGES)
    refused = _try_download(wanted, work)
    if refused and "usr-is-merged" in refused:
        # Older releases do not have it.
        wanted.remove("usr-is-merged")
        refused = _try_download(wanted, work)
    if refused:
        # No package lists, or old ones: fetch them into a place of our own, which needs no root.
        lists = work / "lists"
        (lists / "partial").mkdir(parents=True)
        options = ["-o", f"Dir::State::lists={lists}"]
        _apt(["update", *options], work)
        refused = _try_download(wanted, work, options)
    if refused:
        raise ImageError("lab/debian: apt could not get the packages", details=refused, resolution=_HINT)
    packages = sorted(work.glob("*.deb"))
    return [package for package in packages if package.name.partition("_")[0] not in _LEFT_OUT]


def download_one(name: str, work: Path) -> Path:
    """Download one package without what it needs. Raises ImageError."""
    done = _apt(["download", name], work)
    found = sorted(work.glob(f"{name}_*.deb"))
    if not found:
        raise ImageError(f"apt could not download {name}: {_last_line(done)}", resolution=_HINT)
    return found[0]


def extract_package(package: Path, target: Path) -> None:
    """Unpack a package's files below `target`. Raises ImageError."""
    tool = _need("dpkg-deb")
    done = subprocess.run([tool, "-x", package, target], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"{package.name}: {_last_line(done)}")


def write_base(packages: list[Path], out: Sink) -> float:
    """Merge the packages into one tar on `out`; the moment of the youngest file, in seconds since the epoch.

    The same packages give the same bytes (where the same Python runs us, see `_compile`): members keep the owners,
    modes and times they have in their package.
    """
    merge = _Merge(out)
    for name in ("bin", "sbin", "lib", "lib64"):
        merge.link(name, f"usr/{name}")
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        # Decompression is most of the work, and each package is a process of its own.
        for unpacked in pool.map(_to_tar, packages):
            merge.add_package(unpacked)
            unpacked.unlink()
    merge.finish()
    return merge.moment


class _Merge:
    """Members of many packages as one tar, each path once."""

    def __init__(self, out: Sink) -> None:
        self.moment = 0.0
        self._out = out
        self._archive = tarfile.open(fileobj=_Stream(out), mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._seen: set[str] = set()
        self._kept: dict[str, bytes] = {}

    def link(self, name: str, target: str, *, mtime: int = 0) -> None:
        """Add a symbolic link unless the path is there."""
        member = tarfile.TarInfo(name)
        member.type, member.linkname, member.mode, member.mtime = tarfile.SYMTYPE, target, 0o777, mtime
        self._add(member, None)

    def file(self, name: str, data: bytes, mode: int = 0o644, *, mtime: int | None = None) -> None:
        """Add a small file unless the path is there; by default it gets the youngest time so far."""
        member = tarfile.TarInfo(name)
        member.mode, member.size, member.mtime = mode, len(data), int(self.moment) if mtime is None else mtime
        self._add(member, io.BytesIO(data))

    def add_package(self, unpacked: Path) -> None:
        """Add the files of one package, given as its tar, without documentation."""
        with tarfile.open(unpacked) as archive:
            for member in archive:
                name = _place(member.name)
                # Newer base-files brings the merged-/usr links itself: they are here already.
                is_merge_link = member.issym() and member.name.strip("./") in _MERGED
                if name and not is_merge_link and not f"{name}/".startswith(_NO_FILES):
                    self._take(archive, member, name)

    def finish(self) -> None:
        """Add what maintainer scripts would have made, and end the tar."""
        for name in ("passwd", "group"):
            master = self._kept.get(f"usr/share/base-passwd/{name}.master")
            if master is not None:
                self.file(f"etc/{name}", master.replace(b":*:", b":x:"))
                if name == "passwd":
                    names = [line.split(b":")[0] for line in master.splitlines()]
                    self.file("etc/shadow", b"".join(user + b":*:19000:0:99999:7:::\n" for user in names), 0o640)
        for name, data in (("hostname", b""), ("hosts", b"127.0.0.1\tlocalhost\n"), ("resolv.conf", b"")):
            self.file(f"etc/{name}", data)
        for name, target in (
            ("usr/bin/awk", "mawk"),
            ("usr/bin/which", "which.debianutils"),
            ("usr/bin/pager", "more"),
            ("etc/mtab", "/proc/mounts"),
            ("etc/os-release", "../usr/lib/os-release"),
        ):
            self.link(name, target, mtime=int(self.moment))
        for name, mode in (("root", 0o700), ("proc", 0o755), ("sys", 0o755), ("dev", 0o755), ("tmp", 0o1777)):
            self._directory(name, mode)
        self._archive.close()

    def _take(self, archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> None:
        copy = tarfile.TarInfo(name)
        copy.type, copy.mode, copy.size, copy.mtime = member.type, member.mode, member.size, int(member.mtime)
        copy.uid, copy.gid, copy.devmajor, copy.devminor = member.uid, member.gid, member.devmajor, member.devminor
        # A hard link names a member of its own archive; a symbolic link is text and stays what it is.
        copy.linkname = _place(member.linkname) or "" if member.islnk() else member.linkname
        self.moment = max(self.moment, float(copy.mtime))
        data = archive.extractfile(member) if member.isreg() else None
        if name in ("usr/share/base-passwd/passwd.master", "usr/share/base-passwd/group.master") and data is not None:
            self._kept[name] = data.read()
            data = io.BytesIO(self._kept[name])
        compiled = None
        if data is not None and _is_compiled(name):
            source = data.read()
            data, compiled = io.BytesIO(source), _compile(name, source, copy.mtime)
        self._add(copy, data)
        if compiled is not None:
            cache = importlib.util.cache_from_source(name, optimization="")
            self._directory(os.path.dirname(cache), 0o755, mtime=copy.mtime)
            self.file(cache, compiled, mtime=copy.mtime)

    def _directory(self, name: str, mode: int, *, mtime: int | None = None) -> None:
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.mtime = tarfile.DIRTYPE, mode, int(self.moment) if mtime is None else mtime
        self._add(member, None)

    def _add(self, member: tarfile.TarInfo, data: IO[bytes] | None) -> None:
        if member.name not in self._seen:
            self._seen.add(member.name)
            self._archive.addfile(member, data)


class _Stream(io.RawIOBase):
    """What tarfile's stream mode writes to."""

    def __init__(self, out: Sink) -> None:
        self._out = out

    def writable(self) -> bool:
        return True

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        return self._out.write(data)


def _to_tar(package: Path) -> Path:
    target = package.with_suffix(".tar")
    with target.open("wb") as out:
        done = subprocess.run(
            [_need("dpkg-deb"), "--fsys-tarfile", package], stdout=out, stderr=subprocess.PIPE, text=True, check=False
        )
    if done.returncode:
        if "No space left" in done.stderr:
            raise DiskFull("unpacking packages: no space left on device", resolution=DISK_FULL_HINT)
        raise ImageError(f"{package.name} cannot be unpacked: {_last_line(done)}", resolution=_HINT)
    return target


def _is_compiled(name: str) -> bool:
    """Whether this is a module we compile: one of the list, of the Python version that runs this."""
    match = _LIBRARY.fullmatch(name)
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    return match is not None and match[1] == own and match[2] in _COMPILED


def _compile(name: str, source: bytes, mtime: int) -> bytes | None:
    """Byte code as in a .pyc file that is checked by time (importlib, PEP 552); None for source that is not Python."""
    try:
        code = compile(source, f"/{name}", "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError):
        return None
    header = b"".join(number.to_bytes(4, "little") for number in (0, mtime & 0xFFFFFFFF, len(source) & 0xFFFFFFFF))
    # Version 2 knows no references, which depend on what else this process has loaded: equal sources, equal bytes.
    return importlib.util.MAGIC_NUMBER + header + marshal.dumps(code, 2)


def _place(name: str) -> str:
    """Path of a package's member in the root file system, relative, with the directories merged into /usr."""
    path = name.removeprefix("./").strip("/")
    if path in (".", ""):
        return ""
    return f"usr/{path}" if path.partition("/")[0] in _MERGED else path


def _try_download(names: list[str], work: Path, options: list[str] | None = None) -> str | None:
    """Download packages with all they need; apt's complaint, or None when all went well."""
    status, extended = work / "status", work / "extended"
    status.touch()
    (work / "partial").mkdir(exist_ok=True)
    done = _apt(
        [
            *("install", "--yes", "--download-only", "--no-install-recommends"),
            *("-o", f"Dir::State::status={status}", "-o", f"Dir::State::extended_states={extended}"),
            *(options or []),
            *names,
        ],
        work,
    )
    return None if done.returncode == 0 else done.stderr.strip() or done.stdout.strip() or "apt-get failed"


def _apt(arguments: list[str], work: Path) -> subprocess.CompletedProcess[str]:
    options = {
        "Debug::NoLocking": "1",
        # As root apt would drop to the user _apt, who may not write into a store of mode 0700.
        "APT::Sandbox::User": "root",
        "Dir::Cache::archives": str(work),
        "Acquire::Retries": "2",
    }
    command = [_need("apt-get"), "-q", *(word for item in options.items() for word in ("-o", "=".join(item)))]
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            [*command, *arguments],
            cwd=work,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as err:
        raise ImageError(f"apt has not answered for {_TIMEOUT_S:g} s", resolution=_HINT) from err
    if "No space left" in done.stderr or "enough free space" in done.stderr:
        raise DiskFull("downloading packages: no space left on device", resolution=DISK_FULL_HINT)
    return done


def _need(tool: str) -> str:
    found = shutil.which(tool)
    if found is None:
        raise ImageError(
            f"this machine has no {tool}: packages cannot be used here",
            resolution="use lab/busybox, or make an image of any root file system with `labkernel import FILE.tar`",
        )
    return found


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr or done.stdout or "").strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"
