"""The driver proot, for real: as a plain user of this machine, and as uid 1000 in a container of real Docker."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from confined import REPO, Place, docker_place, plain_place
from waiting import wait_until

from labkernel.runtime import prootmonitor, prootprogram

pytestmark = pytest.mark.skipif(
    shutil.which("proot") is None or os.uname().machine != "x86_64", reason="no proot on PATH, or not x86-64"
)


@pytest.fixture(scope="module", params=["plain", pytest.param("docker", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with plain_place() if request.param == "plain" else docker_place() as found:
        yield found


@pytest.fixture(autouse=True)
def clean(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test: nothing runs over the store, and `system check` finds nothing."""
    yield
    if "place" not in request.fixturenames:
        return
    place: Place = request.getfixturevalue("place")
    for name in place.ok("ps", "-aq").split():
        place.ok("rm", "-f", name)
    assert place.labkernel("system", "check").returncode == 0
    assert tracers(place) == []


def tracers(place: Place) -> list[str]:
    """Command lines of every PRoot over the place's store."""
    mark = f"-r {place.inner_home}/root/containers/"
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if mark in words and process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z":
                lines.append(words)
    return lines


def sleepers(place: Place, seconds: int) -> int:
    """How many `sleep SECONDS` of the containers run, seen from inside the place."""
    code = (
        "import glob\nfound = 0\nfor path in glob.glob('/proc/[0-9]*/cmdline'):\n try:\n"
        f"  found += open(path, 'rb').read().split(bytes(1)) == [b'sleep', b'{seconds}', b'']\n"
        " except OSError: pass\nprint(found)"
    )
    return int(place.run(sys.executable, "-c", code).stdout)


# -- containers ----------------------------------------------------------------------------------------------


def test_probe_and_description(place: Place) -> None:
    found = place.python("import json; print(json.dumps([lab.driver.name, lab.driver.describes, lab.driver.overlay]))")
    name, describes, overlay = json.loads(found)
    assert (name, overlay) == ("proot", "copy")
    assert "Not protected" in describes
    assert "network" in describes
    doctor = place.labkernel("doctor")
    assert "driver: proot" in doctor.stdout + doctor.stderr


def test_run_and_exit_codes(place: Place) -> None:
    done = place.labkernel("run", "--rm", "lab/busybox", "sh", "-c", "echo out; echo err >&2; id -u; pwd; exit 3")
    assert done.returncode == 3
    assert done.stdout == "out\n0\n/\n"
    assert "err\n" in done.stderr
    for words, code, text in (
        (["sh", "-c", "kill -9 $$"], 137, ""),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["nosuch"], 127, 'exec: "nosuch": executable file not found in $PATH'),
        (["/etc/passwd"], 126, 'exec: "/etc/passwd": permission denied'),
        (["/nowhere/x"], 127, "no such file or directory"),
    ):
        done = place.labkernel("run", "--rm", "lab/busybox", *words)
        assert done.returncode == code, done.stderr
        assert text in done.stderr
        assert "proot info" not in done.stderr


def test_root_is_the_image_and_dev_its_own(place: Place) -> None:
    out = place.ok(
        "run", "--rm", "lab/busybox", "sh", "-c", "ls /; echo x >/dev/null && ls /dev; env; stat -c %U /bin/sh"
    )
    words = out.split()
    assert "bin" in words
    assert "boot" not in words
    assert {"null", "zero", "pts", "shm"} <= set(words)
    assert "PROOT" not in out
    assert "root" in words
    assert place.ok("run", "--rm", "--user", "daemon", "lab/busybox", "id", "-un").strip() == "daemon"
    assert place.ok("run", "--rm", "-w", "/made/here", "lab/busybox", "pwd").strip() == "/made/here"


def test_what_is_missing_is_said(place: Place) -> None:
    found = place.python(
        "c = lab.containers.create('lab/busybox', 'true', mem_limit='64m', pids_limit=5, network_mode='none');"
        "print('\\n'.join(c.warnings))"
    )
    assert "isolation of files: " in found
    assert "network, ipc, hostname" in found
    assert "memory limit is per-process" in found
    assert "pids limit: none" in found
    assert "--network none: none" in found
    found = place.python(
        "c = lab.containers.create('lab/busybox', 'true', sysctls={'net.x': '1'}, tmpfs={'/t': ''}, shm_size='1m');"
        "print('\\n'.join([*c.warnings, *c.update(mem_limit='64m')['Warnings']]))"
    )
    for word in ("--sysctl: none", "--tmpfs: a directory", "--shm-size: none", "memory limit is per-process"):
        assert word in found


def test_a_device_of_the_machine_is_shown_with_its_access(place: Place) -> None:
    given = ("--device", "/dev/zero:/dev/mine/z", "--device", "/dev/null:/dev/r:r")
    line = ("run", "--rm", *given, "lab/busybox", "sh", "-c")
    found = place.ok(*line, "head -c 2 /dev/mine/z | od -An -tx1; cat /dev/r; : > /dev/mine/z && echo ok")
    assert found.split() == ["00", "00", "ok"]


def test_memory_limit_holds_per_process(place: Place) -> None:
    hog = 'BEGIN { s = "x"; for (i = 0; i < 26; i++) s = s s; print length(s) }'
    assert place.ok("run", "--rm", "lab/busybox", "awk", hog).strip() == "67108864"
    limited = place.labkernel("run", "--rm", "-m", "32m", "lab/busybox", "awk", hog)
    assert limited.stdout.strip() != "67108864"


def test_background_processes_end_with_the_command(place: Place) -> None:
    done = place.labkernel(
        "run", "--rm", "lab/busybox", "sh", "-c", "sleep 4711 & setsid sleep 4711 & sleep 0.2; exit 6"
    )
    assert done.returncode == 6
    assert sleepers(place, 4711) == 0


def test_logs_exec_pause_and_stop(place: Place) -> None:
    script = 'trap "echo got term; exit 5" TERM; echo started; while :; do sleep 0.1; done'
    place.ok("run", "-d", "--name", "one", "lab/busybox", "sh", "-c", script)
    place.logs_hold("one", "started")
    done = place.labkernel(
        "exec", "-e", "WHO=me", "-w", "/tmp", "one", "sh", "-c", "echo $WHO; pwd; touch /tmp/made; exit 4"
    )
    assert (done.returncode, done.stdout) == (4, "me\n/tmp\n")
    assert place.ok("exec", "one", "ls", "/tmp") == "made\n"
    assert place.labkernel("exec", "one", "nosuch").returncode == 127
    assert "while :" in place.ok("top", "one")
    place.ok("pause", "one")
    assert "Paused" in place.ok("ps")
    place.ok("unpause", "one")
    place.ok("stop", "one")
    assert "Exited (5)" in place.ok("ps", "-a")
    assert place.ok("logs", "one") == "started\ngot term\n"
    place.ok("start", "one")
    assert place.ok("exec", "one", "ls", "/tmp") == "made\n"


def test_kill_reaches_everything(place: Place) -> None:
    place.ok(
        "run",
        "-d",
        "--name",
        "tree",
        "lab/busybox",
        "sh",
        "-c",
        "for i in 1 2 3; do setsid sh -c 'sleep 4712 & sleep 4712' & done; echo started; wait",
    )
    place.logs_hold("tree", "started")
    place.ok("exec", "-d", "tree", "sleep", "4712")
    wait_until(lambda: sleepers(place, 4712) == 7)
    place.ok("kill", "tree")
    wait_until(lambda: "Exited (137)" in place.ok("ps", "-a"))
    assert sleepers(place, 4712) == 0


def test_stop_kills_what_does_not_listen(place: Place) -> None:
    place.ok(
        "run", "-d", "--name", "deaf", "lab/busybox", "sh", "-c", 'trap "" TERM; echo up; while :; do sleep 1; done'
    )
    place.logs_hold("deaf", "up")
    place.ok("stop", "-t", "1", "deaf")
    assert "Exited (137)" in place.ok("ps", "-a")


def test_terminal(place: Place) -> None:
    out = place.python(
        "print(lab.containers.run('lab/busybox', ['sh', '-c', 'test -t 0 && tty && stty size'], tty=True, remove=True))"
    )
    assert "/dev/pts/" in out


# -- files ---------------------------------------------------------------------------------------------------


def test_volumes_are_binds(place: Place) -> None:
    data = f"{place.inner_home}/data"
    other = place.home / "other"
    other.mkdir(mode=0o755)
    (other / "old").write_text("old\n")
    other.chmod(0o777)
    script = "echo new >/data/new; cat /ro/old; echo no >/ro/no; echo v >/vol/v; ls /ro"
    done = place.labkernel(
        *(
            "run",
            "--rm",
            "-v",
            f"{data}:/data",
            "-v",
            f"{place.inner_home}/other:/ro:ro",
            "-v",
            "named:/vol",
            "--tmpfs",
            "/scratch",
        ),
        *("lab/busybox", "sh", "-c", script),
    )
    assert done.stdout == "old\nold\n"
    assert (place.home / "data/new").read_text() == "new\n"
    assert place.ok("run", "--rm", "-v", "named:/vol", "lab/busybox", "cat", "/vol/v") == "v\n"
    place.ok("volume", "rm", "named")
    if landlock(place):
        assert "/ro/no: Permission denied" in done.stderr


@pytest.mark.parametrize("running", [True, False])
def test_cp(place: Place, running: bool) -> None:
    (place.home / "in").mkdir(exist_ok=True)
    (place.home / "in/f").write_text("from here\n")
    (place.home / "secret").write_text("secret")
    script = (
        f"mkdir /d; echo hi > /d/f; ln -s {place.inner_home} /out; ln -s /d /in; echo v > /vol/v; echo up; sleep 1000"
    )
    words = ("-v", "named:/vol", "-v", "named:/ro:ro", "--tmpfs", "/t")
    place.ok("run", "-d", "--name", "one", *words, "lab/busybox", "sh", "-c", script)
    place.logs_hold("one", "up")
    if not running:
        place.ok("stop", "-t", "0", "one")
    for path, text in (("/d/f", "hi"), ("/in/f", "hi"), ("/vol/v", "v"), ("/ro/v", "v"), ("/etc/hosts", "localhost")):
        place.ok("cp", f"one:{path}", f"{place.inner_home}/got")
        assert text in (place.home / "got").read_text(), path
    for path in ("/out/secret", "/vol/../out/secret", "/out/../secret"):
        done = place.labkernel("cp", f"one:{path}", f"{place.inner_home}/got")
        assert done.returncode == 1
        assert "Could not find the file" in done.stderr
    for target in ("/d/g", "/vol/g", "/t/g", "/in/h"):
        place.ok("cp", f"{place.inner_home}/in/f", f"one:{target}")
    place.ok("cp", f"{place.inner_home}/in", "one:/d")
    refused = place.labkernel("cp", f"{place.inner_home}/in/f", "one:/ro/g2")
    assert refused.returncode == 1
    assert "ead-only file system" in refused.stderr
    if not running:
        place.ok("start", "one")
    shown = place.ok("exec", "one", "cat", "/d/g", "/vol/g", "/d/h", "/d/in/f", *(["/t/g"] if running else []))
    assert shown == "from here\n" * (5 if running else 4)
    place.ok("rm", "-f", "one")
    place.ok("volume", "rm", "named")


def landlock(place: Place) -> bool:
    return place.python("from labkernel.linux import landlock; print(landlock.version() >= 2)") == "True"


def test_files_and_memory_outside_are_closed(place: Place) -> None:
    if not landlock(place):
        pytest.skip("this kernel has no Landlock 2")
    keeper = place.python("print(lab.runtime.ensure().keeper_pid)")
    (place.home / "secret").write_text("secret")
    os.chmod(place.home / "secret", 0o644)
    # The root of another process leads out of the translated paths; the kernel says no.
    for path in (f"/proc/{keeper}/environ", f"/proc/{keeper}/root{place.inner_home}/secret"):
        done = place.labkernel("run", "--rm", "lab/busybox", "cat", path)
        assert done.returncode == 1
        assert "secret" not in done.stdout
        assert done.stdout == ""


CALLS = r"""
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void) {
  int numbers[] = {332, 322, 425, 435, 437, 439, 452};
  char zeros[256] = {0};
  for (unsigned i = 0; i < sizeof numbers / sizeof *numbers; i++) {
    /* where openat has its flags the others have a buffer */
    void *third = numbers[i] == SYS_openat ? NULL : zeros;
    long found = syscall(numbers[i], -100, "/etc/passwd", third, 24, zeros);
    printf("%d %s\n", numbers[i], found < 0 ? strerror(errno) : "ok");
  }
  printf("openat %s\n", syscall(SYS_openat, -100, "/etc/passwd", 0) < 0 ? strerror(errno) : "ok");
  return 0;
}
"""


def test_no_call_passes_untranslated(place: Place, tmp_path: Path) -> None:
    """What PRoot does not know would reach this machine's own paths."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: apt-get install gcc libc6-dev")
    (tmp_path / "calls.c").write_text(CALLS)
    subprocess.run([compiler, "-static", "-o", tmp_path / "calls", tmp_path / "calls.c"], check=True)
    (place.home / "bin").mkdir(exist_ok=True)
    shutil.copy(tmp_path / "calls", place.home / "bin/calls")
    os.chmod(place.home / "bin/calls", 0o755)
    volume = f"{place.inner_home}/bin:/probe:ro"
    *unknown, known = place.ok("run", "--rm", "-v", volume, "lab/busybox", "/probe/calls").splitlines()
    assert known.endswith(" ok")
    assert len(unknown) == 7
    assert all(line.endswith(" Function not implemented") for line in unknown), unknown


def test_nothing_of_the_engine_is_open(place: Place) -> None:
    words = place.ok("run", "--rm", "lab/busybox", "sh", "-c", "ls /proc/$$/fd; readlink /proc/$$/cwd").split()
    assert words[:-1] == ["0", "1", "2"]
    assert words[-1] == "/"


def test_a_read_only_root(place: Place) -> None:
    if not landlock(place):
        pytest.skip("this kernel has no Landlock 2")
    script = "touch /x; echo y > /etc/passwd; rm /bin/sh; touch /t/y && echo made"
    done = place.labkernel("run", "--rm", "--read-only", "--tmpfs", "/t", "lab/busybox", "sh", "-c", script)
    assert done.stdout == "made\n"
    assert done.stderr.count("ermission denied") == 3, done.stderr


def test_no_program_gives_more_rights(place: Place) -> None:
    found = place.ok(
        "run", "--rm", "lab/busybox", "grep", "-E", "^(NoNewPrivs|Cap(Inh|Prm|Eff|Amb)):", "/proc/self/status"
    )
    assert {int(line.split()[1], 16) for line in found.splitlines() if line.startswith("Cap")} == {0}
    assert "NoNewPrivs:\t1" in found


# -- what is killed ------------------------------------------------------------------------------------------


def pids_of(place: Place, name: str) -> tuple[int, int]:
    """(monitor, PRoot) as the place numbers them."""
    code = (
        f"from labkernel.runtime.prootmonitor import children; p = lab.containers.get('{name}').runtime_state()['pid'];"
    )
    monitor, proot = place.python(f"{code} print(p, children(p)[0])").split()
    return int(monitor), int(proot)


@pytest.mark.parametrize("role", ["pid", "keeper_pid"])
def test_container_survives_a_killed_supervisor_or_keeper(place: Place, role: str) -> None:
    place.ok(
        "run",
        "-d",
        "--name",
        "kept",
        "lab/busybox",
        "sh",
        "-c",
        "while [ ! -e /go ]; do sleep 0.1; done; echo bye; exit 9",
    )
    place.run("/bin/sh", "-c", f"kill -9 {place.python(f'print(lab.runtime.ensure().{role})')}")
    assert place.ok("exec", "kept", "touch", "/go") == ""
    assert place.ok("wait", "kept").strip() == "9"
    assert place.ok("logs", "kept") == "bye\n"


@pytest.mark.parametrize("who", ["monitor", "proot"])
def test_nothing_goes_on_untraced(place: Place, who: str) -> None:
    place.ok(
        "run", "-d", "--name", "shot", "lab/busybox", "sh", "-c", "sleep 4713 & while :; do echo x >/tmp/untraced; done"
    )
    monitor, proot = pids_of(place, "shot")
    place.run("/bin/sh", "-c", f"kill -9 {monitor if who == 'monitor' else proot}")
    wait_until(lambda: "Exited (137)" in place.ok("ps", "-a"))
    wait_until(lambda: sleepers(place, 4713) == 0)
    assert place.run("/bin/sh", "-c", "cat /tmp/untraced").returncode != 0


# -- builds --------------------------------------------------------------------------------------------------

DOCKERFILE = """\
FROM lab/busybox AS one
RUN echo built >/etc/built && rm /etc/nsswitch.conf && mkdir -p /srv/x && echo 1 >/srv/x/one && chmod 600 /etc/group
RUN rm -r /srv/x && mkdir /srv/x && echo 2 >/srv/x/two
RUN mkdir /closed && touch /closed/in && chmod 0 /closed/in /closed
COPY --chmod=640 a.txt /app/
COPY d /app/d
WORKDIR /app/w
ENV WHO=world
RUN ["/bin/sh", "-c", "echo hello $WHO >greeting; ls -d /dev/pipes /etc/hosts"]
RUN chown 5:6 /app/d/e/f && echo joe:x:1000:1000::/home/joe:/bin/sh >> /etc/passwd && mkdir -p /home/joe \\
 && chown joe: /home/joe && chown 0:0 greeting
USER joe
RUN echo his > /home/joe/his
FROM lab/busybox
COPY --from=one /app /copied
COPY --chown=daemon a.txt /owned
COPY --from=one /srv /srv
CMD ["cat", "/copied/w/greeting"]
"""


def make_context(place: Place) -> str:
    folder = place.home / "context"
    if not folder.exists():
        (folder / "d/e").mkdir(parents=True)
        (folder / "a.txt").write_text("a\n")
        (folder / "d/e/f").write_text("f\n")
        (folder / "Dockerfile").write_text(DOCKERFILE.replace(" /dev/pipes", ""))
    return f"{place.inner_home}/context"


def image_listing(place: Place, name: str) -> dict[str, str]:
    """path -> mode and owner of an image's files, as its tar says."""
    archive = f"{place.inner_home}/{name}.tar"
    done = place.run("/bin/sh", "-c", f"{sys.executable} -m labkernel.cli image export {name} >{archive}")
    assert done.returncode == 0, done.stderr
    import tarfile

    with tarfile.open(place.home / f"{name}.tar") as tar:
        return {member.name.strip("/"): f"{member.mode:o} {member.uid}:{member.gid} {member.size}" for member in tar}


def test_build(place: Place) -> None:
    context = make_context(place)
    place.ok("build", "-t", "one", "--target", "one", context)
    place.ok("build", "-t", "web", context)
    assert place.ok("run", "--rm", "web") == "hello world\n"
    files = image_listing(place, "one")
    assert files["app/a.txt"] == "640 0:0 2"
    assert files["etc/group"].startswith("600")
    assert {"etc/built", "srv/x/two", "app/d/e/f", "app/w/greeting", "closed/in"} <= set(files)
    # In the pod 1000 is the number of its own user.
    assert (files["app/d/e/f"], files["app/w/greeting"]) == ("644 5:6 2", "644 0:0 12")
    assert (files["home/joe"].split()[1], files["home/joe/his"]) == ("1000:1000", "644 1000:1000 4")
    assert not {"etc/nsswitch.conf", "srv/x/one"} & set(files)
    assert not any(name.startswith(("dev/null", "proc/")) for name in files)
    second = image_listing(place, "web")
    assert second["owned"] == "644 1:1 2"
    assert {"copied/w/greeting", "srv/x/two"} <= set(second)
    failed = place.labkernel("build", "--no-cache", context, "--build-arg", "X=1", "--target", "nosuch")
    assert failed.returncode != 0


def test_build_has_the_same_files_as_with_overlay(place: Place, tmp_path: Path) -> None:
    if place.inner_home != str(place.home):
        pytest.skip("only once, where another driver is at hand")
    make_context(place)
    place.ok("build", "-t", "one", "--target", "one", f"{place.inner_home}/context")
    other = Path(tempfile.mkdtemp(prefix="lk-o-", dir="/tmp"))
    env = {**os.environ, "LABKERNEL_ROOT": f"{other}/root", "LABKERNEL_RUNTIME_DIR": f"{other}/run"}
    env.pop("LABKERNEL_DRIVER", None)
    twin = Place(other, [], env, str(other))
    try:
        shutil.copytree(place.home / "context", other / "context")
        twin.ok("build", "-t", "one", "--target", "one", f"{other}/context")
        assert image_listing(place, "one") == image_listing(twin, "one")
    finally:
        twin.python("lab.runtime.shutdown(force=True)")
        shutil.rmtree(other, ignore_errors=True)


# -- parts ---------------------------------------------------------------------------------------------------


def test_shim_gives_status_and_hides_four_variables(tmp_path: Path) -> None:
    path = tmp_path / "shim"
    path.write_bytes(prootprogram.shim())
    path.chmod(0o755)
    for script, expected in (("exit 7", 7), ("kill -9 $$", 137), ('test "$E$D" = 5 || exit 1', 0)):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(write, 3)
            env = {"A": "1", "B": "2", "C": "3", "D": "4", "E": "5"}
            os.execve(path, [str(path), "/bin/sh", "sh", "-c", script], env)
        os.close(write)
        status = int.from_bytes(os.read(read, 4), "little")
        os.close(read)
        os.waitpid(pid, 0)
        assert prootmonitor.code_of(status) == expected


def test_a_store_gets_the_shim_of_this_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one drops another number of PRoot's variables."""
    before = prootprogram.prepare(tmp_path)["shim"]
    monkeypatch.setattr(prootprogram, "_SHIM_CODE", prootprogram._SHIM_CODE + b"\x90")
    after = prootprogram.prepare(tmp_path)["shim"]
    assert Path(before).read_bytes() != Path(after).read_bytes() == prootprogram.shim()


def test_a_killed_tracer_is_known_while_it_is_still_going() -> None:
    """On a busy machine a command, let go, ended before its PRoot could be waited for: its status was believed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        held = b"x" * (300 << 20)  # takes a while to give back
        os.write(write, held[:1])
        signal.pause()
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.close(read)
    assert not prootmonitor.is_dying(pid)
    assert prootmonitor._Monitor(pid, -1)._killed_tracer() is None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: prootmonitor.is_dying(pid))
    assert prootmonitor._Monitor(pid, -1)._killed_tracer() == 137


@pytest.mark.parametrize("seen_first", ["tracer", "status"])
def test_a_killed_tracer_is_what_ended_the_command(seen_first: str) -> None:
    """Both can come in one poll; the command's own status, untraced, is then of something else."""
    # In a process of its own: the monitor reaps whatever child there is.
    code = (
        "import os, signal\nfrom labkernel.runtime.prootmonitor import _Monitor\n"
        "reading, writing = os.pipe2(os.O_NONBLOCK)\ntracer = os.fork()\n"
        "if tracer == 0:\n signal.pause()\n"
        "os.kill(tracer, signal.SIGKILL)\nos.waitid(os.P_PID, tracer, os.WEXITED | os.WNOWAIT)\n"
        "os.write(writing, (139 << 8).to_bytes(4, 'little'))\nmonitor = _Monitor(tracer, reading)\n"
        f"if {seen_first!r} == 'tracer':\n monitor._reap()\n"
        "assert monitor._take_status()\nprint(monitor.code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPO)
    assert done.stdout == "137\n", done.stderr


def test_store_is_refused_without_proot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from labkernel.errors import DriverError

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DriverError, match="needs the program proot") as caught:
        prootprogram.prepare(tmp_path)
    assert "apt install proot" in str(caught.value.resolution)
