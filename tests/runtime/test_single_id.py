"""The driver rootless where one id is mapped: a user other than root is that id by another name, with nothing more."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from confined import Place, single_place

NO_CAPABILITIES = dict.fromkeys(("CapInh", "CapPrm", "CapEff", "CapAmb"), 0)
DEFAULT = 0xA80425FB  # Docker's 14
STATUS = "grep -E '^(Cap|Seccomp:)' /proc/self/status"


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with single_place() as found:
        yield found


@pytest.fixture
def box(place: Place) -> Iterator[str]:
    """A container that runs as www-data."""
    place.ok("run", "-d", "--name", "box", "--network", "none", "--user", "www-data", "lab/busybox", "sleep", "1000")
    yield "box"
    place.ok("rm", "-f", "box")


def run(place: Place, *words: str) -> str:
    return place.ok("run", "--rm", "--network", "none", *words)


def status_of(text: str) -> dict[str, int]:
    return {name: int(value, 16) for name, value in (line.split(":\t") for line in text.splitlines())}


def test_it_has_the_numbers_asked_for(place: Place) -> None:
    command = "id -u; id -g; touch /x; stat -c '%u %g' / /x /etc/shadow; cat /proc/self/uid_map"
    said = run(place, "--user", "33:44", "lab/busybox", "sh", "-c", command).split("\n")
    assert said[:5] == ["33", "44", "33 44", "33 44", "33 44"]
    assert said[5].split() == ["33", "0", "1"]


def test_it_has_no_right_that_root_has(place: Place) -> None:
    found = status_of(run(place, "--user", "33", "lab/busybox", "sh", "-c", STATUS))
    assert found == {**NO_CAPABILITIES, "CapBnd": DEFAULT, "Seccomp": 2}
    for command in ("mount -t tmpfs none /mnt", "hostname other", "chroot / true", "chown 5 /etc/passwd"):
        done = place.labkernel("run", "--rm", "--network", "none", "--user", "33", "lab/busybox", "sh", "-c", command)
        assert done.returncode not in (0, 125), (command, done.stderr)


def test_its_first_process_may_be_the_engines(place: Place) -> None:
    assert run(place, "--init", "--user", "5:6", "lab/busybox", "sh", "-c", "id -u; id -g; kill -0 1") == "5\n6\n"


def test_commands_join_it(place: Place, box: str) -> None:
    assert place.ok("exec", box, "sh", "-c", "id -u; id -g") == "33\n33\n"
    found = status_of(place.ok("exec", box, "sh", "-c", STATUS))
    assert found == {**NO_CAPABILITIES, "CapBnd": DEFAULT, "Seccomp": 2}
    assert place.ok("exec", box, "sh", "-c", "kill -0 1 && readlink /proc/1/exe") == "/bin/sleep\n"
    # Root is root of what the container is in, as it was.
    assert place.ok("exec", "-u", "0", box, "sh", "-c", "id -u; mkdir /made; stat -c %u /made") == "0\n0\n"
    assert place.ok("exec", box, "stat", "-c", "%u", "/made") == "33\n"
    refused = place.labkernel("exec", "-u", "44", box, "id")
    assert refused.returncode == 126
    assert "44:0 is not mapped" in refused.stderr
    assert "--add-subuids" in refused.stderr


def test_apt_is_told(place: Place) -> None:
    """It cannot become its own user. What says so is in no image, and only where apt is."""
    context = place.home / "apt"
    context.mkdir()
    (context / "Dockerfile").write_text(
        "FROM lab/busybox\nRUN mkdir -p /etc/apt/apt.conf.d && echo own > /etc/apt/apt.conf.d/10own\n"
        "RUN cat /etc/apt/apt.conf.d/* > /seen; rm -r /etc/apt; ls /etc > /left\n"
    )
    place.ok("build", "-t", "apt", "--network", "none", str(context))
    assert run(place, "apt", "cat", "/seen").splitlines()[::2] == ["own", 'APT::Sandbox::User "root";']
    assert "apt" not in run(place, "apt", "cat", "/left").split()
    assert place.labkernel("run", "--rm", "--network", "none", "lab/busybox", "ls", "/etc/apt").returncode == 1
    changed = place.ok("image", "diff", "lab/busybox", "apt")
    assert "apt" not in changed.replace("/seen", ""), changed


def test_it_lives_as_others_do(place: Place, box: str) -> None:
    place.ok("stop", "-t", "1", box)
    place.ok("start", box)
    assert place.ok("exec", box, "id", "-u") == "33\n"
    place.ok("cp", f"{box}:/etc/passwd", f"{place.inner_home}/passwd")
    place.ok("cp", f"{place.inner_home}/passwd", f"{box}:/tmp/passwd")
    assert place.ok("exec", box, "cmp", "/etc/passwd", "/tmp/passwd") == ""
    assert place.ok("system", "check") == "nothing inconsistent, nothing leaked\n"
