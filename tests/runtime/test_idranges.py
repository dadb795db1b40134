"""Subordinate id ranges for real: a system user made for this test, newuidmap, and images with more than one owner."""

from __future__ import annotations

import json
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
COUNT = 65536
GROUP = 54321  # one that the user is in beside its own, as the one to which /dev/kvm belongs

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a system user")


class Owner:
    """A system user with `COUNT` subordinate user and group ids from `first` on, and a store in its home."""

    def __init__(self, name: str, home: Path, first: int) -> None:
        self.name = name
        self.home = home
        self.first = first
        entry = pwd.getpwnam(name)
        self.uid, self.gid = entry.pw_uid, entry.pw_gid
        self.env = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(REPO),
            "PYTHONDONTWRITEBYTECODE": "1",
            "LABKERNEL_ROOT": str(home / "root"),
            "LABKERNEL_RUNTIME_DIR": str(home / "run"),
        }

    def run(self, *command: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        ids = [f"--reuid={self.uid}", f"--regid={self.gid}", f"--groups={GROUP}"]
        return subprocess.run(
            ["setpriv", *ids, "--", *command],
            env=self.env,
            cwd=self.home,
            input=input,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def labkernel(self, *words: str) -> str:
        done = self.run(sys.executable, "-m", "labkernel.cli", *words)
        assert done.returncode == 0, f"labkernel {' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def python(self, code: str) -> Any:
        """The JSON that `code` prints; `lab` is the engine."""
        done = self.run(sys.executable, "-c", "import json, labkernel\nlab = labkernel.connect()\n" + code)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def owners(self) -> dict[str, int]:
        """Owner by path below the store of all files that are not this user's own."""
        found = {}
        for folder, names, files in os.walk(self.home / "root"):
            for name in [*names, *files]:
                info = os.lstat(f"{folder}/{name}")
                if info.st_uid != self.uid:
                    found[f"{folder}/{name}"] = info.st_uid
        return found


def _free_range() -> int:
    """First of `COUNT` ids that neither table gives to anybody."""
    first = 0x30000000
    for path in ("/etc/subuid", "/etc/subgid"):
        try:
            lines = Path(path).read_text().splitlines()
        except FileNotFoundError:
            continue
        for words in (line.split(":") for line in lines):
            if len(words) == 3:
                first = max(first, int(words[1]) + int(words[2]))
    return first


def _shell(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def owner() -> Iterator[Owner]:
    for tool in ("useradd", "usermod", "userdel", "newuidmap", "newgidmap", "setpriv"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: apt-get install passwd uidmap util-linux")
    name = f"lk-ids-{secrets.token_hex(4)}"
    home = Path(tempfile.mkdtemp(prefix="lk-i-", dir="/tmp"))
    try:
        _shell("useradd", "--system", "--user-group", "--no-create-home", "--home-dir", str(home), name)
        first = _free_range()
        words = f"{first}-{first + COUNT - 1}"
        _shell("usermod", "--add-subuids", words, "--add-subgids", words, name)
        made = Owner(name, home, first)
        os.chown(home, made.uid, made.gid)
        if made.run(sys.executable, "-c", "import labkernel").returncode:
            pytest.skip("a plain user cannot read this checkout or its interpreter")
        yield made
        made.python("lab.runtime.shutdown(force=True); print('{}')")
        # All that belonged to subordinate ids went with the containers and images; rm -r as root would hide a leak.
    finally:
        # Removes the user's lines in /etc/subuid and /etc/subgid, too.
        subprocess.run(["userdel", name], check=False, capture_output=True)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_of_subids_left(owner: Owner) -> Iterator[None]:
    yield
    owner.labkernel("container", "prune", "--force")


def test_the_driver_says_what_it_has(owner: Owner) -> None:
    found = owner.python("print(json.dumps([lab.driver.name, lab.driver.id_mapping, lab.runtime.ensure().id_map]))")
    assert found == ["rootless", "subuid", "ranges"]


def test_ids_inside(owner: Owner) -> None:
    lines = owner.labkernel(
        "run", "--rm", "lab/busybox", "cat", "/proc/self/uid_map", "/proc/self/gid_map"
    ).splitlines()
    maps = [[int(word) for word in line.split()] for line in lines]
    assert sum(count for _, _, count in maps) == 2 * (COUNT + 1)
    assert [1, owner.first, COUNT] in maps
    assert "uid=0(root) gid=0(root)" in owner.labkernel("run", "--rm", "lab/busybox", "id")
    assert owner.labkernel("run", "--rm", "--user", "1000:1000", "lab/busybox", "id", "-u").strip() == "1000"


def test_groups_stay_with_the_supervisor(owner: Owner) -> None:
    """A machine's QEMU may need one to open /dev/kvm; nothing that a container runs has them."""
    script = "grep -h Groups: /proc/1/status /proc/self/status"
    try:
        for flags in ((), ("--init",)):
            owner.labkernel("run", "-d", "--name", "long", *flags, "lab/busybox", "sleep", "600")
            for _ in range(2):  # the second exec is by a child that was made ahead of time
                assert owner.labkernel("exec", "long", "sh", "-c", script).split() == ["Groups:", "0"] * 2
            owner.labkernel("rm", "--force", "long")
    finally:
        owner.labkernel("rm", "--force", "long")
    device = owner.home / "device"
    device.touch()
    os.chown(device, 0, GROUP)
    device.chmod(0o060)
    assert owner.python(f"print(json.dumps(lab.runtime.task('os:access', path={str(device)!r}, mode=6)))") is True
    device.unlink()


def test_files_of_other_ids_are_made_and_removed(owner: Owner) -> None:
    script = (
        "mkdir -p /d/e; touch /d/e/f; chown -R 1000:1001 /d; chmod 700 /d; stat -c %u:%g /d/e/f; ls -l /dev/pts/ptmx"
    )
    out = owner.labkernel("run", "--name", "owned", "lab/busybox", "sh", "-c", script)
    assert out.startswith("1000:1001\n")
    upper = {path: uid for path, uid in owner.owners().items() if "/containers/" in path}
    assert set(upper.values()) == {owner.first + 999}
    assert {Path(path).name for path in upper} >= {"d", "e", "f"}
    assert owner.labkernel("start", "--attach", "owned").startswith("1000:1001\n")
    owner.labkernel("rm", "owned")
    assert {path for path in owner.owners() if "/containers/" in path} == set()
    assert not any((owner.home / "root" / "containers").iterdir())


def test_automatic_removal(owner: Owner) -> None:
    script = "mkdir /x; touch /x/y; chown -R 33:33 /x; chmod 0 /x/y /x"
    owner.labkernel("run", "--rm", "lab/busybox", "sh", "-c", script)
    owner.labkernel("ps", "--all")
    owner.python("lab.runtime.ensure(); print('{}')")
    assert not any("/containers/" in path for path in owner.owners())


def test_a_terminal_and_exec_as_another_user(owner: Owner) -> None:
    owner.labkernel("run", "-d", "--name", "long", "lab/busybox", "sleep", "600")
    try:
        assert owner.labkernel("exec", "--user", "1234:77", "long", "sh", "-c", "id -u; id -g").split() == [
            "1234",
            "77",
        ]
        assert owner.labkernel("exec", "long", "stat", "-c", "%g", "/dev/pts").strip() == "0"
    finally:
        owner.labkernel("rm", "--force", "long")


def test_builds_keep_owners(owner: Owner) -> None:
    folder = owner.home / "context"
    folder.mkdir()
    (folder / "Dockerfile").write_text(
        "FROM lab/busybox\n"
        "RUN mkdir /own && touch /own/made && chown -R 1000:1000 /own\n"
        "COPY --chown=1000:2000 copied /own/copied\n"
        "RUN chmod 2750 /own && chgrp 3000 /own/made\n"
        "USER 1000\n"
        'CMD ["sh", "-c", "id -u; stat -c %n:%u:%g:%a /own /own/made /own/copied"]\n'
    )
    (folder / "copied").write_text("text")
    for path in (folder, *folder.iterdir()):
        os.chown(path, owner.uid, owner.gid)
    owner.labkernel("build", "--tag", "owned", str(folder))
    lines = owner.labkernel("run", "--rm", "owned").split()
    assert lines == ["1000", "/own:1000:1000:2750", "/own/made:1000:3000:644", "/own/copied:1000:2000:644"]
    # id 1 is the first of the range; the base has files of its own owners as well
    assert owner.first + 999 in owner.owners().values()
    # The archive holds the ids of the container, not those of the machine.
    out = owner.home / "out.tar"
    owner.labkernel("image", "export", "owned", "--output", str(out))
    import tarfile

    with tarfile.open(out) as tar:
        found = {member.name: (member.uid, member.gid, stat.S_IMODE(member.mode)) for member in tar.getmembers()}
    assert found["own/copied"] == (1000, 2000, 0o644)
    assert found["own"] == (1000, 1000, 0o2750)
    owner.labkernel("ps", "--all")  # drops the row of the container that removed itself, which names the image
    owner.labkernel("image", "rm", "owned")
    owner.labkernel("builder", "prune", "--all", "--force")
    assert owner.first + 999 not in owner.owners().values()


def test_volumes_of_other_owners(owner: Owner) -> None:
    write = "echo kept > /v/file; chown -R 1000:1000 /v; chmod 700 /v"
    owner.labkernel("run", "--rm", "-v", "mine:/v", "lab/busybox", "sh", "-c", write)
    assert (
        owner.labkernel("run", "--rm", "--user", "1000", "-v", "mine:/v", "lab/busybox", "cat", "/v/file") == "kept\n"
    )
    owner.labkernel("volume", "rm", "mine")
    assert not any("/volumes/" in path for path in owner.owners())


def test_system_check_is_empty(owner: Owner) -> None:
    assert owner.python("print(json.dumps([str(problem) for problem in lab.check(verify=True)]))") == []
    owner.labkernel("image", "rm", "lab/busybox")
    assert owner.owners() == {}
