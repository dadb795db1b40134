"""Owners that a build's RUN gives to files where the disk cannot keep them: recorded, and so in the image.

With one mapped id chown(2) fails, and without any namespace (driver proot) it does nothing. A filter hands the call
over instead (SECCOMP_RET_USER_NOTIF), and what answers it writes the owner down as unpacking does (oci/ownership.py):
in an extended attribute, or for links and fifos, which have none, in the step's notes. stat(2) goes on to show root.

PRoot has put the machine's own paths into the call by then, and this user's id in the place of 0. So the id of this
user may mean root or itself: itself where the command says so (`chown`, `install`), and in that user's home.
Source: man 2 seccomp_unotify, man 2 chown. Standard library and `labkernel.linux` only.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..linux import syscalls
from ..linux.ownfiles import CAPABILITY_XATTR, OWNER_XATTR, own_xattr, writable_own
from . import accounts, asking
from .asking import Question, still_waits

if TYPE_CHECKING:
    from .instances import Instance

NOTES = "owners"
"""The file in a step's directory. A line of JSON each: [path, uid, gid], or {"user": [uid, gid]} of the command's
user."""

_CALLS = {
    "x86_64": {92: "chown", 93: "fchown", 94: "lchown", 260: "fchownat"},
    "aarch64": {55: "fchown", 54: "fchownat"},
}
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
_KEEP = 0xFFFFFFFF
_AT_FDCWD, _AT_SYMLINK_NOFOLLOW, _AT_EMPTY_PATH = -100, 0x100, 0x1000
_LOOK = os.O_PATH | os.O_CLOEXEC
_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_MAX_PATH = 4096


def program(*, unknown: Sequence[int] = (), asked: bool = True) -> bytes:
    """A system call filter (struct sock_filter array) that asks about the calls of chown (if `asked`), answers ENOSYS
    to those in `unknown`, and allows all else. b"" on a machine whose calls are not known here."""
    machine = os.uname().machine
    if machine not in _CALLS:
        return b""
    chosen = [(number, 0x7FC00000) for number in _CALLS[machine] if asked]
    chosen += [(number, 0x00050000 | errno.ENOSYS) for number in unknown]
    allow = (0x06, 0, 0, 0x7FFF0000)
    lines = [(0x20, 0, 0, 4), (0x15, 1, 0, _ARCHITECTURES[machine]), allow, (0x20, 0, 0, 0)]
    for number, answer in chosen:
        lines += [(0x15, 0, 1, number), (0x06, 0, 0, answer)]
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, allow])


class Recorder:
    """Decides on the calls of one container. `fd`: its filter's listener; `notes`: the path of the notes; `tree`: under
    proot the directory that is its root."""

    def __init__(self, fd: int, notes: str, tree: str = "") -> None:
        self.fd = fd
        self._notes = notes
        self._tree = tree

    def decide(self, question: Question) -> int:
        """Record what the call wants."""
        try:
            self._record(question, _CALLS[os.uname().machine][question.number])
        except OSError as err:
            return err.errno or errno.EIO
        except (ValueError, LookupError, ArithmeticError):  # the container's nonsense is no reason to end
            return errno.EINVAL
        return 0

    def _record(self, question: Question, call: str) -> None:
        args = question.args
        uid, gid = (word & 0xFFFFFFFF for word in (args[2:4] if call == "fchownat" else args[1:3]))
        with self._target(question, call) as target:
            if target is None:
                return  # nothing that could become part of a layer
            name = f"/proc/self/fd/{target}"
            path = os.readlink(name)[len(self._tree) :]
            uid, gid = _Meaning(question.pid, path, self._tree).of(uid, gid)
            status = os.fstat(target)
            if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                _write(name, status, uid, gid)
            elif path.startswith("/"):  # not a pipe
                # A change of no effect, by which it becomes part of the layer.
                os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns))
                _note(self._notes, [path, *(0 if word == _KEEP else word for word in (uid, gid))])

    @contextmanager
    def _target(self, question: Question, call: str) -> Iterator[int | None]:
        """A descriptor (O_PATH) of the file that a call names."""
        pid, args = question.pid, question.args
        flags = args[4] if call == "fchownat" else _AT_SYMLINK_NOFOLLOW if call == "lchown" else 0
        text = "" if call == "fchown" else _text(pid, args[1 if call == "fchownat" else 0])
        opened: list[int] = []
        try:
            if call == "fchown" or (not text and flags & _AT_EMPTY_PATH):
                opened.append(os.open(_held(pid, args[0]), _LOOK))
                inside = not self._tree or os.readlink(f"/proc/self/fd/{opened[0]}").startswith(f"{self._tree}/")
            else:
                if not text:
                    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
                opened.append(os.open(self._tree or f"/proc/{pid}/root", _LOOK | os.O_DIRECTORY))
                if not text.startswith("/") and not self._tree:
                    folder = os.readlink(_held(pid, args[0] if call == "fchownat" else _AT_FDCWD))
                    text = f"{folder}/{text}"
                # PRoot has followed what was to be followed.
                follow = not flags & _AT_SYMLINK_NOFOLLOW and not self._tree
                inside = text.startswith(f"{self._tree}/") and not re.match("/(proc|dev|sys)/", text[len(self._tree) :])
                if inside:
                    text = text[len(self._tree) :].lstrip("/") or "."
                    look = _LOOK if follow else _LOOK | os.O_NOFOLLOW
                    opened.append(syscalls.openat2(opened[0], text, look, resolve=_RESOLVE))
            # Only now is it sure that `pid` was the caller, and none that came after it.
            still_waits(self.fd, question)
            yield opened[-1] if inside else None
        finally:
            for fd in opened:
                os.close(fd)


def _held(pid: int, word: int) -> str:
    """The link in /proc to what a process holds at a descriptor. Raises OSError."""
    (number,) = struct.unpack("=i", struct.pack("=I", word & 0xFFFFFFFF))
    path = f"/proc/{pid}/cwd" if number == _AT_FDCWD else f"/proc/{pid}/fd/{number}"
    if not os.path.lexists(path):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return path


def _text(pid: int, address: int) -> str:
    """The string at an address of a process. Raises OSError."""
    found = b""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        while b"\0" not in found and len(found) < _MAX_PATH:
            at = address + len(found)
            try:
                # Up to the end of a page: the next one need not be there. Above the half is the kernel's own.
                piece = os.pread(memory.fileno(), 4096 - at % 4096, at) if at < 1 << 63 else b""
            except OSError:
                piece = b""
            if not piece:
                raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
            found += piece
    return os.fsdecode(found.partition(b"\0")[0])


def _write(name: str, status: os.stat_result, uid: int, gid: int) -> None:
    """Give a file or directory its owner, and take away what an owner's change takes away (man 2 chown)."""
    try:
        parts = own_xattr(name, OWNER_XATTR).split(b":")
    except OSError:
        parts = []
    if len(parts) not in (2, 5):  # none, or nonsense that somebody in the container wrote
        parts = [b"0", b"0"]
    new = [old if word == _KEEP else b"%d" % word for old, word in zip(parts, (uid, gid), strict=False)] + parts[2:]
    mode = left = stat.S_IMODE(status.st_mode)
    if stat.S_ISREG(status.st_mode):
        left &= ~(stat.S_ISUID | (stat.S_ISGID if mode & stat.S_IXGRP else 0))
    with writable_own(name):
        try:
            if new == [b"0", b"0"]:
                with suppress(OSError):
                    os.removexattr(name, OWNER_XATTR)
            else:
                os.setxattr(name, OWNER_XATTR, b":".join(new))
            for gone in ("security.capability", CAPABILITY_XATTR):
                with suppress(OSError):
                    os.removexattr(name, gone)
        except OSError as err:
            if err.errno != errno.EOPNOTSUPP:  # a tmpfs, which is no part of a layer
                raise
    if left != mode:
        os.chmod(name, left)


def _note(notes: str, line: Any) -> None:
    fd = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, json.dumps(line).encode() + b"\n")
    finally:
        os.close(fd)


def note_user(directory: str, uid: int, gid: int) -> None:
    """What the command makes is this user's."""
    _note(f"{directory}/{NOTES}", {"user": [uid, gid]})


class _Meaning:
    """What is meant by a call that names root, or under proot (`tree`) this user, in whose place PRoot puts root.

    stat(2) shows root's ids: a command that only wants to change the group may give 0 for the owner, where it read it.
    So the command line is asked, where it is one of chown, chgrp or install."""

    def __init__(self, pid: int, path: str, tree: str) -> None:
        self._pid = pid
        self._path = path
        self._root = tree or f"/proc/{pid}/root"
        self._as_root = (os.getuid(), os.getgid()) if tree else (0, 0)

    def of(self, uid: int, gid: int) -> tuple[int, int]:
        """The ids that are meant; `_KEEP` for one that is to stay."""
        if uid != self._as_root[0] and gid != self._as_root[1]:
            return uid, gid
        said = self._said()
        return self._meant(uid, 0, {pair[0] for pair in said}), self._meant(gid, 1, {pair[1] for pair in said})

    def _meant(self, id: int, index: int, said: set[str]) -> int:
        if id != self._as_root[index]:
            return id
        if str(id) in said - {"0"}:
            return 0 if "0" in said else id
        if "" in said and "0" not in said:
            return _KEEP
        return id if not said and self._is_home() else 0

    def _said(self) -> list[tuple[str, str]]:
        """The owners (uid, gid as numbers; "" where it gives none) that the command line has for this path."""
        words = self._words()
        lines = [words]
        if "-c" in words[1:-1]:  # a shell that has these commands inside
            lines = [line.split() for line in re.split(r"[;&|()\n]+", words[words.index("-c") + 1])]
        found = []
        for line in lines:
            for index, word in enumerate(line):
                owner, operands = _owner_in(word.rpartition("/")[2], line[index + 1 :])
                if owner and any(map(self._names, operands)):
                    found.append(self._numbers(owner))
        return found

    def _words(self) -> list[str]:
        try:
            with open(f"/proc/{self._pid}/cmdline", "rb") as file:
                return os.fsdecode(file.read()).split("\0")
        except OSError:
            return []

    def _names(self, operand: str) -> bool:
        word = operand.strip("'\"").removeprefix("./").strip("/")
        return word in ("", ".") or bool({*"*?[$`"} & {*word}) or f"/{word.rpartition('../')[2]}/" in f"{self._path}/"

    def _numbers(self, owner: str) -> tuple[str, str]:
        user, colon, group = owner.strip("'\"").partition(":")
        entry = next(
            (each for each in self._lines("passwd") if user and user in (each[0], each[2])), ["", "", user, ""]
        )
        if user and colon and not group:
            group = entry[3]
        return entry[2], next((each[2] for each in self._lines("group") if group == each[0]), group)

    def _is_home(self) -> bool:
        """Whether the path lies in the home of the user in the image who has this user's number, or is its mail."""
        for entry in self._lines("passwd"):
            if len(entry) > 5 and entry[2] == str(self._as_root[0]):
                home = entry[5].rstrip("/")
                mail = f"/var/mail/{entry[0]}", f"/var/spool/mail/{entry[0]}"
                if (home and f"{self._path}/".startswith(f"{home}/")) or self._path in mail:
                    return True
        return False

    def _lines(self, name: str) -> list[list[str]]:
        return [each for each in accounts.lines(f"etc/{name}", self._open) if len(each) > 3]

    def _open(self, path: str, flags: int) -> int:
        root = os.open(self._root, _LOOK)
        try:
            return syscalls.openat2(root, path, flags, resolve=_RESOLVE)
        finally:
            os.close(root)


def _owner_in(command: str, words: list[str]) -> tuple[str, list[str]]:
    """(USER[:GROUP], operands) of a command line behind its name; "" for other commands."""
    if command == "install":
        given = {flag: words[index + 1] for index, flag in enumerate(words[:-1]) if flag in ("-o", "-g")}
        group = f":{given['-g']}" if "-g" in given else ""
        return given.get("-o", "") + group, words[-1:]
    plain = [word for word in words if word and not word.startswith("-")]
    if command not in ("chown", "chgrp") or not plain:
        return "", []
    return (":" if command == "chgrp" else "") + plain[0], plain[1:]


# -- the supervisor's end (driver rootless) ----------------------------------------------------------------------------


def take(sup: Any, inst: Instance, message: dict[str, Any], fds: list[int]) -> None:
    """What the step's child says of its filter: the descriptor to listen at, or why there is none."""
    if message["listener"]:
        inst.owners = Listener(sup, inst, fds[0])
        sup.hold(inst)
    else:
        inst.warnings.append(f"owners that this step gives to files are lost: {message['why']}")


def end(inst: Instance) -> None:
    """The step has ended."""
    listener, inst.owners = inst.owners, None
    if listener is not None:
        listener.close()


class Listener(asking.Listener):
    """The supervisor's end of one step's filter."""

    def __init__(self, sup: Any, inst: Instance, fd: int) -> None:
        super().__init__(sup, fd)
        self._recorder = Recorder(fd, f"{inst.directory}/{NOTES}")

    def decide(self, question: Question) -> int:
        return self._recorder.decide(question)
