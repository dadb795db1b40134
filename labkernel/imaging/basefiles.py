"""The root file system of lab/busybox as a tar made in memory: same busybox, same bytes, on every machine."""

from __future__ import annotations

import io
import os
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ImageError

PASSWD = """\
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bin:x:2:2:bin:/bin:/bin/false
sys:x:3:3:sys:/dev:/bin/false
sync:x:4:100:sync:/bin:/bin/sync
mail:x:8:8:mail:/var/spool/mail:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
operator:x:37:37:Operator:/var:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = """\
root:x:0:
daemon:x:1:
bin:x:2:
sys:x:3:
adm:x:4:
tty:x:5:
disk:x:6:
mail:x:8:
www-data:x:33:
operator:x:37:
users:x:100:
nogroup:x:65534:
"""
_FILES = {
    "etc/passwd": (PASSWD, 0o644),
    "etc/group": (GROUP, 0o644),
    "etc/shadow": ("".join(f"{line.split(':')[0]}:*:::::::\n" for line in PASSWD.splitlines()), 0o600),
    "etc/hostname": ("", 0o644),
    "etc/hosts": ("127.0.0.1\tlocalhost\n::1\tlocalhost\n", 0o644),
    "etc/resolv.conf": ("", 0o644),
    "etc/nsswitch.conf": ("passwd: files\ngroup: files\nhosts: files dns\n", 0o644),
    "etc/os-release": ('NAME="BusyBox"\nID=busybox\nPRETTY_NAME="labkernel lab/busybox"\n', 0o644),
}
_DIRECTORIES = {
    **dict.fromkeys(("bin", "dev", "etc", "home", "lib", "proc", "sbin", "sys", "usr", "usr/bin", "usr/lib"), 0o755),
    **dict.fromkeys(("usr/local", "usr/local/bin", "usr/sbin", "run", "mnt", "opt", "srv"), 0o755),
    **dict.fromkeys(("var", "var/cache", "var/lib", "var/log", "var/spool", "var/spool/mail", "var/www"), 0o755),
    "root": 0o700,
    "tmp": 0o1777,
    "var/tmp": 0o1777,
}
# Names that scripts expect outside /bin.
_LINKS = {"usr/bin/env": "../../bin/env", "usr/bin/awk": "../../bin/awk", "sbin/init": "../bin/init"}

_PT_INTERP = 3


def find_busybox() -> Path | None:
    """A static busybox of this machine: in /bin, /usr/bin or on PATH."""
    places = ["/bin/busybox", "/usr/bin/busybox", "/bin/busybox.static", shutil.which("busybox")]
    return next((Path(place) for place in places if place and is_static_program(Path(place))), None)


def is_static_program(path: Path) -> bool:
    """Whether `path` is an ELF executable of this machine's word size that needs no dynamic loader (man 5 elf)."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
            if header[:4] != b"\x7fELF" or len(header) < 64:
                return False
            order = "<" if header[5] == 1 else ">"
            wide = header[4] == 2
            offset = struct.unpack_from(f"{order}{'Q' if wide else 'I'}", header, 32 if wide else 28)[0]
            size, count = struct.unpack_from(f"{order}HH", header, 54 if wide else 42)
            file.seek(offset)
            table = file.read(size * count)
    except (OSError, struct.error):
        return False
    kinds = [struct.unpack_from(f"{order}I", table, size * index)[0] for index in range(len(table) // max(size, 1))]
    return bool(kinds) and _PT_INTERP not in kinds


def busybox_tar(program: Path) -> tuple[bytes, str, float]:
    """(tar, version, moment): the root file system around `program`; every time in it is the program's own.

    Raises ImageError when the program does not run here.
    """
    try:
        applets = _run(program, "--list").split()
        version = _run(program).split("(")[0].strip()
    except (OSError, subprocess.SubprocessError) as err:
        raise ImageError(
            f"{program} does not run: {err}", resolution="install the package busybox-static for this architecture"
        ) from err
    moment = float(int(program.stat().st_mtime))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for member, data in _members(program.read_bytes(), applets):
            member.mtime = int(moment)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue(), version or "BusyBox", moment


def _members(program: bytes, applets: list[str]) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    for name, mode in sorted(_DIRECTORIES.items()):
        yield _member(name, tarfile.DIRTYPE, mode), b""
    yield _member("bin/busybox", tarfile.REGTYPE, 0o755, size=len(program)), program
    for applet in sorted(set(applets) - {"busybox"}):
        if "/" not in applet:
            yield _member(f"bin/{applet}", tarfile.LNKTYPE, 0o755, link="bin/busybox"), b""
    for name, target in _LINKS.items():
        yield _member(name, tarfile.SYMTYPE, 0o777, link=target), b""
    for name, (text, mode) in _FILES.items():
        yield _member(name, tarfile.REGTYPE, mode, size=len(text)), text.encode()


def _member(name: str, kind: bytes, mode: int, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.size, member.linkname = kind, mode, size, link
    if name == "var/spool/mail":
        member.uid = member.gid = 8
    return member


def _run(program: Path, *arguments: str) -> str:
    env = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, env=env, check=True)
    return done.stdout
