"""What is recorded of owners the disk cannot keep: the filter, and what a call means that names root."""

from __future__ import annotations

import os
import struct
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
    import shlex

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
