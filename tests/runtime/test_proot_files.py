"""Files under the driver proot as a plain user: closed ones, and what a container changed without any overlay.

There a mode binds the owner, too, who in the container is root. Held against the same with this machine's other driver.
"""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from confined import Place, plain_place, single_place
from waiting import wait_until

from labkernel.linux.trees import remove_tree

pytestmark = pytest.mark.skipif(
    shutil.which("proot") is None or os.uname().machine != "x86_64", reason="no proot on PATH, or not x86-64"
)

CLOSED = """\
FROM lab/busybox AS one
RUN mkdir -p /top/c/in /top/d && echo secret > /top/c/in/file && echo zero > /top/zero && echo x > /top/d/x \\
 && chmod 0 /top/zero && chmod 0300 /top/c/in && chmod 0 /top/c
FROM scratch AS flat
COPY --from=one /top /top
FROM lab/busybox
COPY --from=one /top /one
COPY --from=flat /top /again
COPY --from=flat /top/c/in/file /file
COPY --from=flat /top/z* /z/
RUN --mount=from=flat,target=/m cat /m/top/c/in/file /m/top/zero > /read && chmod 0 /read
"""
CHANGE = (
    "rm /file; chmod 0 /z; echo n > /new; chmod 0 /new; mkdir /cl; echo q > /cl/q; chmod 0 /cl; rm -r /one/d; "
    "echo more >> /again/c/in/file; mv /etc/passwd /etc/moved; ln -s /new /etc/group2; touch /read"
)


@pytest.fixture(scope="module")
def proot() -> Iterator[Place]:
    with plain_place() as place:
        yield place


@pytest.fixture(scope="module")
def single() -> Iterator[Place]:
    with single_place() as place:
        yield place


@pytest.fixture(scope="module")
def other() -> Iterator[Place]:
    home = Path(tempfile.mkdtemp(prefix="lk-o-", dir="/tmp"))
    env = {**os.environ, "LABKERNEL_ROOT": f"{home}/root", "LABKERNEL_RUNTIME_DIR": f"{home}/run"}
    env.pop("LABKERNEL_DRIVER", None)
    place = Place(home, [], env, str(home))
    try:
        yield place
        place.python("lab.runtime.shutdown(force=True)")
    finally:
        remove_tree(str(home))


def build(place: Place) -> None:
    context = place.home / "context"
    context.mkdir(exist_ok=True)
    (context / "Dockerfile").write_text(CLOSED)
    place.ok("build", "-t", "closed", "-t", "flat", "--target", "flat", str(context))
    place.ok("build", "-t", "closed", str(context))


def listing(place: Place, *words: str) -> dict[str, str]:
    """path -> mode, owner and size of what a command writes as a tar."""
    archive = f"{place.home}/listing.tar"
    done = place.run("/bin/sh", "-c", f'exec "$0" -m labkernel.cli "$@" > {archive}', sys.executable, *words)
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as tar:
        return {
            member.name.strip("/"): f"{member.mode:o} {member.uid}:{member.gid} {member.size} {member.linkname}"
            for member in tar
        }


def test_builds_read_what_is_closed(proot: Place, other: Place) -> None:
    for place in (proot, other):
        build(place)
    found = listing(proot, "image", "export", "closed")
    assert found == listing(other, "image", "export", "closed")
    assert found["again/c"].startswith("0 0:0")
    assert found["read"] == "0 0:0 12 "
    assert found["one/c/in"].startswith("300 ")


def test_what_a_container_changed(proot: Place, other: Place) -> None:
    said = []
    for place in (proot, other):
        build(place)
        place.ok("run", "--name", "box", "closed", "sh", "-c", CHANGE)
        said.append(place.ok("diff", "box").splitlines())
        place.ok("commit", "-m", "why", "box", "made")
        place.ok("rm", "box")
        assert place.ok("run", "--rm", "made", "cat", "/again/c/in/file", "/cl/q") == "secret\nmore\nq\n"
        assert place.ok("system", "check") == "nothing inconsistent, nothing leaked\n"
    assert said[0] == said[1]
    assert {"D /file", "C /z", "A /new", "A /cl", "A /cl/q", "D /one/d", "D /etc/passwd", "A /etc/moved"} <= set(
        said[0]
    )
    assert listing(proot, "image", "export", "made") == listing(other, "image", "export", "made")
    assert proot.ok("image", "diff", "closed", "made") == other.ok("image", "diff", "closed", "made")


USERS = """\
FROM lab/busybox
RUN echo joe:x:1234:1235::/home/joe:/bin/sh >> /etc/passwd; mkdir -p /home/joe; echo mine > /home/joe/f \\
 && echo kept > /home/joe/kept && chown -R joe:1235 /home/joe \\
 && mkdir -m 777 /open && echo 1 > /open/roots && chmod 666 /open/roots
USER joe
WORKDIR /home/joe
RUN id -u && echo new > new && mkdir -p dir/deep && echo y > f2 && mv f2 f && echo more >> kept && chmod 0 new \\
 && echo 2 >> /open/roots && touch /open/joes && if chown 0 kept; then exit 1; fi
USER 33
RUN touch /open/thirty-three
USER root
RUN touch /open/root && chown 5:6 /home/joe/dir && mkdir /shut && ln -s x /shut/link && chown -h 5:6 /shut/link \\
 && chmod 0 /shut
USER joe
RUN mkdir own && echo 1 > own/one && chmod 0 own
RUN chmod 700 own && echo 2 > own/two && chmod 0 own
"""


def test_what_a_user_makes_is_the_users(proot: Place, single: Place, other: Place) -> None:
    found = []
    for place in (proot, single, other):
        context = place.home / "users"
        context.mkdir()
        (context / "Dockerfile").write_text(USERS)
        place.ok("build", "-t", "users", "--network", "none", str(context))
        found.append(listing(place, "image", "export", "users"))
        del found[-1]["shut/link"]  # an export is of what is unpacked, where a link's owner cannot be kept
    assert found[0] == found[1] == found[2]
    owners = {name: found[0][name].split()[1] for name in found[0] if name.startswith(("home/", "open/"))}
    joes = ("home/joe", "home/joe/f", "home/joe/kept", "home/joe/new", "home/joe/dir/deep", "open/joes")
    joes += ("home/joe/own", "home/joe/own/one", "home/joe/own/two")
    assert owners == dict.fromkeys(joes, "1234:1235") | {
        "home/joe/dir": "5:6",
        "open/roots": "0:0",
        "open/root": "0:0",
        "open/thirty-three": "33:33",
    }


@pytest.mark.parametrize("driver", ["proot", "rootless"])
def test_an_owner_is_given_to_nothing_outside(proot: Place, driver: str) -> None:
    """Who records it stands outside, and is handed paths by the container."""
    place = Place(proot.home, proot.prefix, {**proot.env, "LABKERNEL_DRIVER": driver}, proot.inner_home)
    place.env |= {"LABKERNEL_ROOT": f"{proot.home}/{driver}", "LABKERNEL_RUNTIME_DIR": f"{proot.home}/run-{driver}"}
    (context := proot.home / f"outside-{driver}").mkdir()
    marker = proot.home / f"marker-{driver}"
    marker.touch()
    os.chown(marker, *context.parent.stat()[4:6])
    (context / "Dockerfile").write_text(
        f"FROM lab/busybox\nRUN ln -s {marker} /l; ln -s ../../../../../../../..{marker} /m; "
        f"ln -s /proc/1/root{marker} /n; "
        "chown 5 /l && exit 1; chown 5 /m && exit 1; chown 5 /n; chown -h 5 /l && chown 6 /dev/null; "
        "chown 7 /proc/self/fd/0; chown 8 /; chown 9 ../..; exec 7< /etc/hosts; chown 10 /proc/self/fd/7; true\n"
    )
    done = place.labkernel("build", "--network", "none", "-t", "outside", str(context))
    place.python("lab.runtime.shutdown(force=True)")
    if "DriverError" in done.stderr or "not available" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert os.listxattr(marker) == []
    assert os.listxattr("/dev/null") == []


LISTENED_TO = """
import subprocess, sys
from labkernel.linux import seccomp
from labkernel.linux.syscalls import PR_SET_NO_NEW_PRIVS, prctl
prctl(PR_SET_NO_NEW_PRIVS, 1)
listener = seccomp.install_asking(seccomp.ALLOW_ALL)
words = [sys.executable, "-m", "labkernel.cli"]
done = subprocess.run([*words, "build", "--progress", "plain", "-t", "listened", sys.argv[1]])
subprocess.run([*words, "run", "--rm", "listened", "cat", "/x"])
import labkernel
labkernel.connect().runtime.shutdown(force=True)
sys.exit(done.returncode)
"""


def test_where_somebody_listens_already_it_builds_and_says_what_is_lost(proot: Place) -> None:
    """The kernel lets one filter of a process ask; a pod's own runtime may have it (man 2 seccomp, EBUSY)."""
    home = proot.home
    env = {"LABKERNEL_ROOT": f"{home}/listened", "LABKERNEL_RUNTIME_DIR": f"{home}/run-listened"}
    place = Place(home, proot.prefix, {**proot.env, **env}, proot.inner_home)
    (context := home / "listened-context").mkdir()
    (context / "Dockerfile").write_text("FROM lab/busybox\nRUN echo made > /x && chown 5 /x\n")
    done = place.run(sys.executable, "-c", LISTENED_TO, str(context))
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("made\n")
    assert "owners that this step gives to files are lost: Device or resource busy" in done.stderr


def test_copies_through_closed_directories(proot: Place) -> None:
    build(proot)
    proot.ok("create", "--name", "box", "closed", "true")
    place = Path(proot.inner_home)
    proot.ok("cp", "box:/again/c/in/file", f"{place}/got")
    assert (proot.home / "got").read_text() == "secret\n"
    proot.ok("cp", f"{place}/got", "box:/again/c/in/put")
    assert proot.ok("diff", "box").splitlines() == ["C /again", "C /again/c", "C /again/c/in", "A /again/c/in/put"]
    found = listing(proot, "export", "box")
    assert (found["again/c"][:2], found["again/c/in"][:4]) == ("0 ", "300 ")
    proot.ok("rm", "box")


def test_a_running_container_is_compared(proot: Place) -> None:
    proot.ok("run", "-d", "--name", "box", "lab/busybox", "sh", "-c", "echo a > /a; sleep 1000")
    proot.ok("exec", "box", "sh", "-c", "until test -s /a; do sleep 0.02; done; rm /etc/shadow")
    assert proot.ok("diff", "box").splitlines() == ["A /a", "C /etc", "D /etc/shadow"]
    proot.ok("commit", "box", "running")
    assert proot.ok("ps", "--format", "{{.Status}}").startswith("Up")
    proot.ok("rm", "-f", "box")
    assert proot.ok("run", "--rm", "running", "sh", "-c", "cat /a; ls /etc/shadow || true") == "a\n"


def test_a_machine_has_the_same_files(proot: Place) -> None:
    """A virtual machine's disk is made of them without privileges, too."""
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("no qemu-system-x86_64 on PATH")
    build(proot)
    look = "for f in / /again/c /again/c/in /again/zero /bin/sh /read; do stat -c '%n %a %u:%g' $f; done; cat /read"
    for verb in (("run",), ("vm", "run")):
        assert proot.ok(*verb, "--rm", "closed", "sh", "-c", look).splitlines() == [
            *(
                "/ 755 0:0",
                "/again/c 0 0:0",
                "/again/c/in 300 0:0",
                "/again/zero 0 0:0",
                "/bin/sh 755 0:0",
                "/read 0 0:0",
            ),
            *("secret", "zero"),
        ]


def test_a_machine_shares_directories_as_a_container_does(proot: Place) -> None:
    if not shutil.which("qemu-system-x86_64"):
        pytest.skip("no qemu-system-x86_64 on PATH")
    (shared := proot.home / "shared").mkdir()
    (shared / "file").touch()
    for path in (shared, shared / "file"):
        os.chown(path, *proot.home.stat()[4:6])
    look = (
        "cd /data; chown 5:6 file; mkdir -p made; chown 7 made; touch made/new; stat -c '%n %u:%g' . file made made/new"
    )
    for verb in (("run",), ("vm", "run")):
        said = proot.ok(*verb, "--rm", "-v", f"{proot.inner_home}/shared:/data", "lab/busybox", "sh", "-c", look)
        assert said.splitlines() == [". 0:0", "file 0:0", "made 0:0", "made/new 0:0"]
    assert (shared / "made/new").stat().st_uid == proot.home.stat().st_uid


def test_a_store_of_another_driver_is_taken_over(proot: Place) -> None:
    """Its unpacked layers have owners and whiteouts of another kind. What takes them away had waited for the build that
    needed them."""
    build(proot)
    context = str(proot.home / "context")
    (proot.home / "in.tar").write_bytes(bytes(10240))
    take_leave(proot)
    twin = Place(proot.home, proot.prefix, {**proot.env, "LABKERNEL_DRIVER": "rootless"}, proot.inner_home)
    tried = twin.labkernel("run", "--rm", "--network", "none", "lab/busybox", "true")
    take_leave(twin)
    if tried.returncode != 0:
        pytest.skip(f"the driver rootless does not work here: {tried.stderr}")
    for place in (proot, twin):
        place.ok("build", "--no-cache", "--network", "none", "-t", "closed", context)
        take_leave(place)
    proot.ok("import", str(proot.home / "in.tar"), "imported")


def take_leave(place: Place) -> None:
    """A container that removes itself does so after its answer."""
    wait_until(lambda: not place.ok("ps", "-aq"))
    place.python("lab.runtime.shutdown(force=True)")
