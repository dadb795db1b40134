"""What a container gets and what clients see, on the driver this user can have."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from labkernel.errors import ConflictError, NoSuchContainer, StartError, UsageError
from labkernel.linux import cgroups
from labkernel.linux.waiting import readable
from labkernel.runtime import protocol
from labkernel.runtime.client import Attachment

ROOT = os.getuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="needs more than one user id")
needs_cgroup = pytest.mark.skipif(cgroups.detect().version == 0, reason="no cgroup this user may write")


def gather(attachment: Attachment) -> tuple[bytes, int | None]:
    with attachment:
        return b"".join(data for _, data in attachment), attachment.exit_code


def test_output_and_exit_code(lab: Any) -> None:
    assert lab.output("sh", "-c", "echo out; echo err >&2; exit 3") == (b"out\n", b"err\n", 3)


def test_signal_is_128_and_its_number(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    lab.runtime.start(container_id)
    lab.runtime.kill(container_id)
    assert lab.runtime.wait(container_id).exit_code == 137


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["foo"], 127, 'exec: "foo": executable file not found in $PATH'),
        (["/foo"], 127, 'exec: "/foo": stat /foo: no such file or directory'),
        (["/etc/passwd"], 126, 'exec: "/etc/passwd": permission denied'),
        (["/etc"], 126, 'exec: "/etc": is a directory'),
    ],
)
def test_command_that_cannot_start(lab: Any, args: list[str], code: int, words: str) -> None:
    container_id = lab.create(*args)
    with pytest.raises(StartError) as caught:
        lab.runtime.run(container_id)
    assert (caught.value.exit_code, caught.value.brief) == (code, words)
    state = lab.runtime.states([container_id])[container_id]
    assert (state["status"], state["exit_code"], state["error"]) == ("created", code, words)


def test_stdin_half_close(lab: Any) -> None:
    assert lab.output("sh", "-c", "cat; echo end", input=b"x" * 300_000)[0] == b"x" * 300_000 + b"end\n"


def test_a_frame_longer_than_one_reading_is_not_the_end() -> None:
    """Seen as `docker exec … | wc -c` that lost most of a gigabyte, with exit code 0."""

    class Full:
        """A socket in which everything is there already."""

        def __init__(self, data: bytes) -> None:
            self.data = data

        def recv(self, size: int, _flags: int = 0) -> bytes:
            if not self.data:
                raise BlockingIOError
            piece, self.data = self.data[:size], self.data[size:]
            return piece

    data = os.urandom(1 << 18)
    end = protocol.encode_control({"exited": {"exit_code": 0, "oom_killed": False, "error": ""}})
    frames = protocol.encode_frame(protocol.STDOUT, data) * 3 + end
    attachment = Attachment(Full(frames), {}, bytearray())  # type: ignore[arg-type]
    found = b""
    while pieces := attachment.read_now():
        found += b"".join(piece for _, piece in pieces)
    assert found == data * 3
    assert attachment.exit_code == 0


def test_input_comes_and_ends_at_any_moment_of_a_start(lab: Any) -> None:
    """In the middle of one it ended before the keeper knew of it: the command's input never ended."""
    for turn in range(16):
        container_id = lab.create("sh", "-c", "cat; echo after", stdin_open=True)
        with lab.runtime.attach(container_id, stdin=True, next_start=True) as attachment:
            starting = threading.Thread(target=lab.runtime.start, args=(container_id,))
            starting.start()
            moment = time.monotonic() + turn * 0.0004
            while time.monotonic() < moment:
                pass
            attachment.send(b"early ")
            attachment.close_stdin()
            said = b""
            while (piece := attachment.read(timeout_s=60)) is not None:
                said += piece[1]
            starting.join()
        assert said == b"early after\n"


def test_only_three_descriptors_and_no_way_out(lab: Any) -> None:
    out, _, code = lab.output("sh", "-c", "ls /proc/self/fd | wc -l; pwd; ls /proc/1/cwd/ >/dev/null && echo root")
    # The fourth is the directory that ls itself reads.
    assert out.split() == [b"4", b"/", b"root"]
    assert code == 0


def test_privileges(lab: Any) -> None:
    out = lab.output("cat", "/proc/self/status", nnp=True)[0].decode()
    fields = dict(line.split(":", 1) for line in out.splitlines())
    assert fields["CapBnd"].strip() == "00000000a80425fb"
    assert fields["CapInh"].strip() == fields["CapAmb"].strip() == "0" * 16
    assert fields["NoNewPrivs"].strip() == "1"


@needs_root
def test_named_user_of_the_image(lab: Any) -> None:
    out = lab.output("sh", "-c", "id; echo $HOME; grep CapEff /proc/self/status", user_unresolved="alice")[0]
    groups = b"groups=50(staff),1000(alice)"
    assert out == b"uid=1000(alice) gid=1000(alice) " + groups + b"\n/home/alice\nCapEff:\t0000000000000000\n"
    assert b"uid=1000(alice) gid=50(staff)" in lab.output("id", user_unresolved="alice:staff")[0]


def test_unknown_user(lab: Any) -> None:
    with pytest.raises(StartError, match="unable to find user bob: no matching entries in passwd file"):
        lab.output("id", user_unresolved="bob")


def test_file_systems(lab: Any) -> None:
    out = lab.output("cat", "/proc/self/mountinfo")[0].decode()
    lines = {line.split()[4]: line for line in out.splitlines()}
    assert {"/", "/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys"} <= set(lines)
    assert lines["/sys"].split()[5].startswith("ro,")
    assert lines["/proc/sys"].split()[5].startswith("ro,")
    for line in lines.values():
        assert "shared:" not in line
        assert "master:" not in line


def test_masked_paths(lab: Any) -> None:
    assert lab.output("sh", "-c", "cat /proc/kcore | wc -c; ls /sys/firmware | wc -l")[0].split() == [b"0", b"0"]


def test_hostname_and_files(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "hostname; cat /etc/hostname; grep -c localhost /etc/hosts")
    out, _ = gather(lab.runtime.run(container_id))
    assert out.split() == [container_id[:12].encode()] * 2 + [b"2"]


def test_readonly_root(lab: Any) -> None:
    _, err, code = lab.output("touch", "/file", readonly=True)
    assert b"Read-only file system" in err
    assert code == 1


def test_mount_points_do_not_stay_in_the_upper_directory(lab: Any) -> None:
    container_id = lab.create("touch", "/made")
    lab.runtime.run(container_id).wait()
    upper = lab.root / "containers" / container_id / "upper"
    assert sorted(path.name for path in upper.rglob("*") if not path.is_dir()) == ["made"]


def test_binds_and_tmpfs(lab: Any) -> None:
    outside = lab.base / "outside"
    outside.mkdir()
    (outside / "file").write_text("data")
    mounts = [
        {"destination": "/rw", "type": "bind", "source": str(outside), "options": ["rbind", "rprivate"]},
        {"destination": "/ro", "type": "bind", "source": str(outside), "options": ["rbind", "ro"]},
        {"destination": "/one", "type": "bind", "source": str(outside / "file"), "options": ["bind", "ro"]},
        {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k", "nosuid", "noexec"]},
    ]
    script = "cat /one; touch /rw/new; touch /ro/bad; touch /t/x && grep ' /t ' /proc/mounts"
    out, err, _ = lab.output("sh", "-c", script, mounts=mounts)
    assert out.startswith(b"data")
    assert b"size=64k" in out
    assert b"noexec" in out
    assert b"/ro/bad: Read-only file system" in err
    assert (outside / "new").exists()


def test_links_in_the_image_cannot_lead_a_mount_outside(lab: Any) -> None:
    target = lab.base / "precious"
    target.mkdir()
    (lab.rootfs / "trap").symlink_to(f"../../../../../..{target}")
    mounts = [{"destination": "/trap/x", "type": "tmpfs", "options": []}]
    container_id = lab.create("true", mounts=mounts)
    with pytest.raises(StartError):
        lab.runtime.start(container_id)
    assert list(target.iterdir()) == []


def test_working_directory_is_made(lab: Any) -> None:
    assert lab.output("pwd", cwd="/a/b c")[0] == b"/a/b c\n"


def test_limits_are_lowered(lab: Any) -> None:
    limits = [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": 128}]
    assert lab.output("sh", "-c", "ulimit -n; ulimit -Hn", rlimits=limits)[0].split() == [b"64", b"128"]


def test_limit_that_needs_more_privilege_is_a_warning(lab: Any) -> None:
    limits = [{"type": "RLIMIT_NOFILE", "soft": 64, "hard": (1 << 30) - 1}]
    with lab.runtime.run(lab.create("true", rlimits=limits)) as attachment:
        attachment.wait()
    assert attachment.exit_code == 0


def test_terminal(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "tty; read x; stty size; echo got $x", tty=True, stdin_open=True)
    with lab.runtime.run(container_id, stdin=True) as attachment:
        assert attachment.read() == ("stdout", b"/dev/pts/0\r\n")
        attachment.resize(33, 99)
        attachment.send(b"line\n")
        text = b"".join(data for _, data in attachment)
    assert b"33 99" in text
    assert b"got line" in text


def test_init_reaps_and_forwards(lab: Any) -> None:
    script = 'trap "exit 9" TERM; echo up; while :; do sleep 0.05; done'
    container_id = lab.create("sh", "-c", script, init=True)
    with lab.runtime.run(container_id) as attachment:
        assert attachment.read() == ("stdout", b"up\n")
        command = Path(f"/proc/{attachment.pid}/cmdline").read_bytes()
        assert command.rstrip(b"\0") == b"labkernel-init"
        lab.runtime.stop(container_id, timeout_s=30)
        assert attachment.wait().exit_code == 9


def test_stop_then_kill(lab: Any) -> None:
    container_id = lab.create("sleep", "1000")  # pid 1 without a handler ignores SIGTERM
    lab.runtime.start(container_id)
    lab.runtime.stop(container_id, timeout_s=0.1)
    assert lab.runtime.wait(container_id).exit_code == 137


def test_pause(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "read x; echo $x", stdin_open=True)
    attachment = lab.runtime.run(container_id, stdin=True)
    lab.runtime.pause(container_id)
    assert lab.runtime.states([container_id])[container_id]["status"] == "paused"
    with pytest.raises(ConflictError, match="already paused"):
        lab.runtime.pause(container_id)
    attachment.send(b"later\n")
    with pytest.raises(TimeoutError):
        attachment.read(timeout_s=0.2)
    lab.runtime.unpause(container_id)
    assert gather(attachment) == (b"later\n", 0)


@needs_cgroup
def test_out_of_memory_is_seen(lab: Any) -> None:
    resources = {"memory": {"limit": 16 << 20, "swap": 16 << 20}}
    container_id = lab.create("dd", "if=/dev/zero", "of=/dev/null", "bs=100M", "count=1", resources=resources)
    status = lab.runtime.run(container_id).wait()
    assert (status.exit_code, status.oom_killed) == (137, True)


@needs_cgroup
def test_usage_is_told_at_the_end_and_kept(lab: Any) -> None:
    container_id = lab.create(
        "sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; head -c 8m /dev/zero | tail"
    )
    with lab.runtime.run(container_id) as attachment:
        attachment.wait()
    kept = lab.runtime.states([container_id])[container_id]["usage"]
    assert kept == attachment.usage
    assert kept["cpu_usec"] > 1000
    assert kept["memory_peak_bytes"] > 8 << 20
    assert kept["source"] == "cgroup"


@needs_cgroup
def test_limits_reach_the_kernel(lab: Any) -> None:
    container_id = lab.create("sleep", "60", resources={"memory": {"limit": 64 << 20}, "pids": {"limit": 17}})
    lab.runtime.start(container_id)
    state = lab.runtime.states([container_id])[container_id]["cgroup"]
    group = cgroups.Cgroup.reopen(state["paths"])
    assert group.figures()["memory_limit_bytes"] == 64 << 20
    assert group.procs() == [lab.runtime.states([container_id])[container_id]["pid"]]


def test_auto_remove(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "mkdir -p /x/y; echo z > /x/y/z; chmod 0 /x", auto_remove=True)
    removed: list[int] = []
    waiter = threading.Thread(target=lambda: removed.append(lab.runtime.wait(container_id, "removed").exit_code))
    with lab.runtime.run(container_id) as attachment:
        waiter.start()
        assert attachment.wait().exit_code == 0
    waiter.join(20)
    assert removed == [0]
    assert not (lab.root / "containers" / container_id).exists()


def test_remove(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    lab.runtime.start(container_id)
    with pytest.raises(ConflictError, match="stop the container before"):
        lab.runtime.remove(container_id)
    lab.runtime.remove(container_id, force=True)
    assert not (lab.root / "containers" / container_id).exists()
    with pytest.raises(NoSuchContainer):
        lab.runtime.remove(container_id)


def test_remove_waits_for_running_tidy(lab: Any) -> None:
    container_id = lab.create("true")
    lab.runtime.run(container_id).wait()
    lab.runtime.remove(container_id)
    assert not (lab.root / "containers" / container_id).exists()


def test_start_again(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "n=$(cat /n 2>/dev/null || echo 0); n=$((n + 1)); echo $n | tee /n")
    assert gather(lab.runtime.run(container_id)) == (b"1\n", 0)
    assert gather(lab.runtime.run(container_id)) == (b"2\n", 0)
    assert lab.log(container_id) == b"1\n2\n"


def test_restart_policy(lab: Any) -> None:
    policy = {"name": "on-failure", "max_retries": 2}
    container_id = lab.create("sh", "-c", "echo try; exit 4", restart=policy)
    with lab.runtime.run(container_id) as attachment:
        assert attachment.wait().exit_code == 4
    assert lab.log(container_id) == b"try\n" * 3
    assert lab.runtime.states([container_id])[container_id]["restart_count"] == 2


def test_wrong_state_and_unknown_names(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    with pytest.raises(ConflictError, match="is not running"):
        lab.runtime.kill(container_id)
    lab.runtime.start(container_id)
    with pytest.raises(ConflictError, match="already running"):
        lab.runtime.start(container_id)
    with pytest.raises(UsageError):
        lab.runtime.kill(container_id, 999)
    for name in ("f" * 64, "../x", ""):
        with pytest.raises(NoSuchContainer):
            lab.runtime.start(name)


def test_exec(lab: Any) -> None:
    container_id = lab.create("sleep", "60", env=["PATH=/bin", "A=1", "B=1"])
    lab.runtime.start(container_id)
    process = {"args": ["sh", "-c", "echo $A$B; ps | wc -l; ls /proc/self/fd | wc -l; exit 5"], "env": ["B=2"]}
    out, code = gather(lab.runtime.exec(container_id, process))
    assert out.split()[0] == b"12"
    assert out.split()[-1] == b"4"
    assert code == 5
    for args, expected in ((["foo"], 127), (["/etc/passwd"], 126)):
        with pytest.raises(StartError) as caught:
            lab.runtime.exec(container_id, {"args": args})
        assert caught.value.exit_code == expected
    with lab.runtime.exec(container_id, {"args": ["cat"]}, stdin=True) as attachment:
        attachment.send(b"q" * 200_000)
        attachment.close_stdin()
        assert len(b"".join(data for _, data in attachment)) == 200_000
        assert attachment.exit_code == 0


def test_exec_beside_an_init(lab: Any) -> None:
    """Its first process is the engine's own program, which a plain user may not look into: the way in is its child."""
    container_id = lab.create("sh", "-c", "sleep 60 & exec sleep 61", init=True)
    lab.runtime.start(container_id)
    command = {"args": ["sh", "-c", "cat /proc/1/comm; ls /proc/self/ns | wc -l"]}
    for _ in range(2):
        out, code = gather(lab.runtime.exec(container_id, command))
        assert (out.split()[0], code) == (b"labkernel-init", 0)
    lab.runtime.stop(container_id, timeout_s=0)


def test_exec_with_terminal(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    lab.runtime.start(container_id)
    out, code = gather(lab.runtime.exec(container_id, {"args": ["sh", "-c", "tty; stty size"]}, tty=True))
    assert out == b"/dev/pts/0\r\n24 80\r\n"
    assert code == 0


def helpers_of(supervisor: int) -> list[int]:
    """The children that wait for an exec (runtime/entering.py)."""
    with open(f"/proc/{supervisor}/task/{supervisor}/children") as file:
        children = [int(word) for word in file.read().split()]
    found = []
    for pid in children:
        with contextlib.suppress(OSError):  # gone meanwhile
            if Path(f"/proc/{pid}/comm").read_text() == "labkernel-enter\n":
                found.append(pid)
    return found


def wait_for_helper(supervisor: int) -> int:
    found: list[int] = wait_until(lambda: helpers_of(supervisor), "a child that waits for the next exec")
    return found[0]


def test_exec_by_a_child_made_ahead(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    lab.runtime.start(container_id)
    info = lab.runtime.ensure()
    assert helpers_of(info.pid) == []  # nobody has asked for one
    probe = {"args": ["sh", "-c", "cat /proc/self/status; ls -l /proc/$$/fd; cat /proc/self/cgroup; ps"]}
    first, code = gather(lab.runtime.exec(container_id, probe))
    helper = wait_for_helper(info.pid)
    second, again = gather(lab.runtime.exec(container_id, probe))
    assert (code, again) == (0, 0)
    # same confinement, whichever way it came in
    for word in (b"CapEff", b"CapBnd", b"NoNewPrivs", b"Seccomp:", b"Groups", b"SigIgn", b"SigBlk", b":/labkernel"):
        assert [line for line in first.splitlines() if word in line] == [
            line for line in second.splitlines() if word in line
        ]
    assert second.count(b"->") == first.count(b"->") <= 4
    assert b"labkernel" not in second.partition(b"COMMAND")[2]  # of the helper nothing is seen inside
    wait_until(lambda: helper not in helpers_of(info.pid), "it is reaped in an idle moment")
    assert wait_for_helper(info.pid) != helper


def test_exec_when_the_waiting_child_was_killed(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    lab.runtime.start(container_id)
    info = lab.runtime.ensure()
    lab.runtime.exec(container_id, {"args": ["true"]}).wait()
    helper = wait_for_helper(info.pid)
    gone = os.pidfd_open(helper)
    os.kill(helper, signal.SIGKILL)
    assert readable(gone, timeout_s=60)
    os.close(gone)
    assert gather(lab.runtime.exec(container_id, {"args": ["echo", "here"]})) == (b"here\n", 0)
    # too long for one datagram: the request comes with the fork
    wait_for_helper(info.pid)
    environment = [f"LONG_{number}={'x' * 100_000}" for number in range(2)]
    process = {"args": ["sh", "-c", "echo ${#LONG_0} ${#LONG_1}"], "env": ["PATH=/bin", *environment]}
    assert gather(lab.runtime.exec(container_id, process)) == (b"100000 100000\n", 0)
    helper = wait_for_helper(info.pid)
    lab.runtime.shutdown(force=True)
    assert not Path(f"/proc/{helper}").exists()


@needs_root
def test_exec_as_user(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    lab.runtime.start(container_id)
    process = {"args": ["sh", "-c", "id -u; echo $HOME; grep -c a80425fb /proc/self/status"], "user": "alice"}
    assert gather(lab.runtime.exec(container_id, process))[0].split() == [b"1000", b"/home/alice", b"1"]


def test_exec_is_in_the_container(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    pid = lab.runtime.start(container_id)
    process = {"args": ["sh", "-c", "echo ready; read x"]}
    with lab.runtime.exec(container_id, process, stdin=True) as attachment:
        attachment.read()
        for space in ("pid", "mnt", "uts", "ipc", "net", "cgroup"):
            assert os.readlink(f"/proc/{attachment.pid}/ns/{space}") == os.readlink(f"/proc/{pid}/ns/{space}")
        mine, theirs = (Path(f"/proc/{p}/cgroup").read_text() for p in (attachment.pid, pid))
        assert mine == theirs


def test_a_container_is_killed_while_execs_begin(lab: Any) -> None:
    """A command killed on its way in is waited for like every other: its container would not end before."""

    def execs(container_id: str) -> None:
        with contextlib.suppress(ConflictError, NoSuchContainer, StartError):
            while True:
                gather(lab.runtime.exec(container_id, {"args": ["true"]}))

    for moment in range(20):
        container_id = lab.create("sleep", "60")
        lab.runtime.start(container_id)
        threads = [threading.Thread(target=execs, args=(container_id,), daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(moment % 5):
            gather(lab.runtime.exec(container_id, {"args": ["true"]}))
        lab.runtime.kill(container_id, signal.SIGKILL)
        assert lab.runtime.wait(container_id).exit_code == 137
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)


def test_exec_ends_with_its_container(lab: Any) -> None:
    container_id = lab.create("sleep", "60")
    lab.runtime.start(container_id)
    with lab.runtime.exec(container_id, {"args": ["sleep", "60"]}) as attachment:
        lab.runtime.kill(container_id)
        assert attachment.wait().exit_code == 137


def test_large_output_reaches_log_and_slow_client(lab: Any) -> None:
    script = "i=0; while [ $i -lt 30 ]; do head -c 100000 /dev/zero | tr '\\0' x; echo; i=$((i+1)); done"
    container_id = lab.create("sh", "-c", script)
    attachment = lab.runtime.run(container_id)
    # Nobody reads, and still the container comes to its end.
    assert lab.runtime.wait(container_id).exit_code == 0
    assert len(lab.log(container_id)) == 30 * 100_001
    out, code = gather(attachment)
    assert (out == lab.log(container_id), code) == (True, 0)


def test_slow_client_of_an_auto_removed_container(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "head -c 3000000 /dev/zero", auto_remove=True)
    attachment = lab.runtime.run(container_id)
    lab.runtime.wait(container_id, "removed")
    out, code = gather(attachment)
    assert (len(out), code) == (3_000_000, 0)


def test_binary_output_is_exact(lab: Any) -> None:
    data = bytes(range(256)) * 40
    container_id = lab.create("cat", stdin_open=True)
    with lab.runtime.run(container_id, stdin=True) as attachment:
        attachment.send(data)
        attachment.close_stdin()
        assert b"".join(chunk for _, chunk in attachment) == data
    assert lab.log(container_id) == data
    assert gather(lab.runtime.attach(container_id, logs=True)) == (data, 0)


def test_attach_to_stopped(lab: Any) -> None:
    container_id = lab.create("echo", "x")
    lab.runtime.run(container_id).wait()
    with pytest.raises(ConflictError, match="cannot attach to a stopped container"):
        lab.runtime.attach(container_id)


def test_wait_conditions(lab: Any) -> None:
    container_id = lab.create("sh", "-c", "exit 6")
    assert lab.runtime.wait(container_id).exit_code == 0  # never started: not running
    codes: list[int] = []
    waiter = threading.Thread(target=lambda: codes.append(lab.runtime.wait(container_id, "next-exit").exit_code))
    waiter.start()
    while not codes:
        lab.runtime.run(container_id).wait()
        waiter.join(0.05)
    assert codes == [6]


def test_many_at_once(lab: Any) -> None:
    results: list[tuple[bytes, bytes, int | None]] = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(lab.output("sh", "-c", f"echo {n}; exit {n}")))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((int(out), code) for out, _, code in results) == [(n, n) for n in range(20)]


def test_host_network_takes_the_cold_path(lab: Any) -> None:
    spaces = ("pid", "mount", "uts", "ipc", "cgroup")
    container_id = lab.create("sleep", "60", namespaces=spaces)
    pid = lab.runtime.start(container_id)
    assert os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net")
    out, code = gather(lab.runtime.exec(container_id, {"args": ["echo", "in"]}))
    assert (out, code) == (b"in\n", 0)


def test_shared_pid_namespace_is_emptied(lab: Any) -> None:
    spaces = ("mount", "uts", "ipc", "network", "cgroup")
    if not ROOT:
        pytest.skip("/proc of a shared pid namespace cannot be mounted by a plain user")
    out, _, code = lab.output("sh", "-c", "sleep 1000 & echo $!; exit 2", namespaces=spaces)
    assert code == 2
    assert not Path(f"/proc/{int(out)}").exists() or "Z" in Path(f"/proc/{int(out)}/stat").read_text()


def test_exec_moment(lab: Any) -> None:
    before = time.monotonic()
    container_id = lab.create("true")
    with lab.runtime.run(container_id) as attachment:
        attachment.wait()
    assert before < attachment.exec_at < time.monotonic()
    assert lab.runtime.states([container_id])[container_id]["exec_at_monotonic"] == attachment.exec_at


def test_kill_with_other_signal(lab: Any) -> None:
    container_id = lab.create("sh", "-c", 'trap "echo usr; exit 0" USR1; echo up; while :; do sleep 0.05; done')
    with lab.runtime.run(container_id) as attachment:
        assert attachment.read() == ("stdout", b"up\n")
        lab.runtime.kill(container_id, signal.SIGUSR1)
        assert gather(attachment) == (b"usr\n", 0)


def test_rotated_log_reaches_a_slow_client_whole(lab: Any) -> None:
    log = {"path": None, "driver": "json-file", "max_bytes": 3_000_000, "max_files": 9}
    id = lab.create("sh", "-c", "i=0; while [ $i -lt 60 ]; do head -c 65536 /dev/zero; i=$((i+1)); done", log=log)
    with lab.runtime.run(id) as attachment:
        lab.runtime.wait(id)
        assert sum(len(data) for _, data in attachment) == 60 * 65536
    assert (lab.root / "containers" / id / "log.json.1").exists()


def test_container_without_a_log(lab: Any) -> None:
    id = lab.create("sh", "-c", "echo out", log={"driver": "none"})
    assert gather(lab.runtime.run(id)) == (b"out\n", 0)
    assert not (lab.root / "containers" / id / "log.json").exists()
