"""What is recorded of owners the disk cannot keep: the filter, and what a call means that names root."""

from __future__ import annotations

import errno
import json
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from labkernel.runtime import owners
from labkernel.runtime.owners import _KEEP, _Meaning

ME = 1000
ALLOW, ASK, REFUSE = 0x7FFF0000, 0x7FC00000, 0x00050026


def answer(program: bytes, number: int, architecture: int) -> int:
    """What the filter says of a call: the five kinds of line it has, carried out (kernel, networking/filter)."""
    lines = [struct.unpack_from("HBBI", program, at) for at in range(0, len(program), 8)]
    at, value = 0, 0
    while True:
        code, yes, no, word = lines[at]
        at += 1
        if code == 0x06:
            return int(word)
        if code == 0x20:
            value = {0: number, 4: architecture}[word]
        else:
            assert code == 0x15
            at += yes if value == word else no


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers of x86-64")
@pytest.mark.parametrize(("asked", "of_chown"), [(True, ASK), (False, ALLOW)])
def test_the_filter(asked: bool, of_chown: int) -> None:
    program = owners.program(unknown=(332, 439), asked=asked)
    native = 0xC000003E
    assert {answer(program, number, native) for number in (92, 93, 94, 260)} == {of_chown}
    assert {answer(program, number, native) for number in (332, 439)} == {REFUSE}
    assert {answer(program, number, native) for number in (0, 1, 91, 95, 259, 261, 333, 440)} == {ALLOW}
    assert answer(program, 92, 0x40000003) == ALLOW  # programs of 32 bits have other numbers


@pytest.fixture
def tree(tmp_path: Path) -> str:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(f"root:x:0:0:root:/root:/bin/sh\njoe:x:{ME}:100:Joe:/home/joe:/bin/sh\n")
    (tmp_path / "etc/group").write_text("root:x:0:\nusers:x:100:\ntea:x:7:\n")
    return str(tmp_path)


CASES = [
    # (command line, path, ids in the call, ids that are meant); this user is 1000:1000, in whose place PRoot puts root
    ("dpkg --unpack x", "/usr/bin/x", (ME, ME), (0, 0)),
    ("tar -x", "/home/joe/x", (ME, ME), (ME, ME)),
    ("useradd -m joe", "/var/mail/joe", (ME, 8), (ME, 8)),
    ("useradd -m ann", "/home/ann", (1001, 1001), (1001, 1001)),
    ("chown 1000:1000 /app", "/app", (ME, ME), (ME, ME)),
    ("chown -R joe: /app", "/app/deep/x", (ME, 100), (ME, 100)),
    ("chown joe /app", "/app", (ME, ME), (ME, _KEEP)),
    ("/bin/chown root:1000 /app", "/app", (ME, ME), (0, ME)),
    ("chown root:root /home/joe/x", "/home/joe/x", (ME, ME), (0, 0)),
    ("chgrp tea /app", "/app", (ME, 7), (_KEEP, 7)),
    ("chown :tea /app", "/app", (ME, 7), (_KEEP, 7)),
    ("install -o joe -m 600 a /etc/a", "/etc/a", (ME, ME), (ME, _KEEP)),
    ("sh -c 'chown 5 /a && chown 1000 /b; chown root /c'", "/b", (ME, 0xFFFFFFFF), (ME, 0xFFFFFFFF)),
    ("sh -c 'chown 5 /a && chown 1000 /b; chown root /c'", "/c", (ME, 0xFFFFFFFF), (0, 0xFFFFFFFF)),
    ("sh -c 'chown 1000 *'", "/w/x", (ME, 0xFFFFFFFF), (ME, 0xFFFFFFFF)),
    ("sh -c 'cd /w; chown 1000 ../b'", "/b", (ME, 0xFFFFFFFF), (ME, 0xFFFFFFFF)),
    ("chown 1000 /ab", "/b", (ME, 0), (0, 0)),
]


@pytest.mark.parametrize(("line", "path", "given", "meant"), CASES)
def test_what_is_meant_under_proot(
    line: str, path: str, given: tuple[int, int], meant: tuple[int, int], tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: ME)
    monkeypatch.setattr(os, "getgid", lambda: ME)
    meaning = _Meaning(os.getpid(), path, tree)
    monkeypatch.setattr(meaning, "_words", lambda: shlex.split(line))
    assert meaning.of(*given) == meant


def test_what_is_meant_where_calls_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for line, given, meant in (
        ("chown 34 /a", (34, 0), (34, _KEEP)),
        ("tar -x", (0, 0), (0, 0)),
        ("x", (ME, 7), (ME, 7)),
    ):
        meaning = _Meaning(os.getpid(), "/a", "")
        monkeypatch.setattr(meaning, "_words", line.split)
        assert meaning.of(*given) == meant


CALLER = """
import ctypes, json, os, socket, sys
from labkernel.linux import seccomp
from labkernel.linux.syscalls import PR_SET_NO_NEW_PRIVS, prctl
from labkernel.runtime import asking, owners
prctl(PR_SET_NO_NEW_PRIVS, 1)
listener = seccomp.install_asking(owners.program())
if os.fork():
    recorder = owners.Recorder(listener, "notes")
    for _ in range(int(sys.argv[1])):
        asking.answer(listener, recorder)
    os._exit(0 if os.wait()[1] == 0 else 1)
os.close(listener)
libc, found = ctypes.CDLL(None, use_errno=True), []
def call(name, *words):
    ctypes.set_errno(0)
    answer = getattr(libc, name)(*words)
    found.append(ctypes.get_errno() if answer else 0)
far = ctypes.c_void_p
held = os.open("file", os.O_RDONLY)
folder = os.open(".", os.O_RDONLY)
for words in (
    ("chown", None, 1, 2), ("chown", far((1 << 64) - 8), 1, 2), ("chown", far(4096), 1, 2), ("chown", b"", 1, 2),
    ("chown", b"none", 1, 2), ("chown", b"file/x", 1, 2), ("chown", b"x" * 5000, 1, 2), ("fchown", 999, 1, 2),
    ("fchownat", 999, b"file", 1, 2, 0), ("fchownat", held, b"file", 1, 2, 0), ("lchown", b"\\xff\\xfe", 1, 2),
    ("chown", b"file", 1, 2), ("fchown", held, 3, -1), ("fchownat", folder, b"sub/../file", -1, 4, 0),
    ("chown", b"link", 5, -1), ("lchown", b"link", 6, 7), ("fchownat", folder, b"link", 8, 9, 0x100),
    ("fchownat", -100, b"", 10, 11, 0x1000), ("fchownat", held, b"", -1, 12, 0x1000), ("lchown", b"odd", 13, 14),
):
    call(*words)
json.dump(found, open("found", "w"))
"""
ERRORS = [
    *(errno.EFAULT, errno.EFAULT, errno.EFAULT, errno.ENOENT, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG),
    *(errno.EBADF, errno.EBADF, errno.ENOTDIR, errno.ENOENT),
]


def test_each_call_is_carried_out_or_refused_as_the_kernel_would(tmp_path: Path) -> None:
    """Also what nobody writes but to do harm: who answers lives in the supervisor."""
    if not owners.program():
        pytest.skip("not for this kind of processor")
    (tmp_path / "sub").mkdir()
    for name in ("file", "odd"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("file")
    try:
        os.setxattr(tmp_path / "odd", "user.labkernel.owner", b"nonsense")
    except OSError as err:
        pytest.skip(f"no user xattrs below {tmp_path}: {err}")
    done = subprocess.run(
        [sys.executable, "-c", CALLER, "20"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(owners.__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found[: len(ERRORS)] == ERRORS
    assert set(found[len(ERRORS) :]) == {0}
    owner = {name: os.getxattr(tmp_path / name, "user.labkernel.owner") for name in (".", "file", "odd")}
    assert owner == {".": b"10:11", "file": b"5:12", "odd": b"13:14"}
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert notes == [[str(tmp_path / "link"), 6, 7], [str(tmp_path / "link"), 8, 9]]
