"""Real guests: from the boot to the end of a command, and everything that can go wrong on the way."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkernel.errors import StartError, VMError
from labkernel.qemu import kernel, machine, template
from labkernel.qemu.machine import Boot, Machines
from labkernel.qemu.session import Command

PATH = ["PATH=/bin"]


@pytest.fixture(scope="module")
def running(machines: Machines, root_disk: Path) -> Iterator[Boot]:
    boot = machines.boot(root_disk, memory_mib=128, hostname="lab")
    yield boot
    boot.session.close()


def run(boot: Boot, *args: str, **options: object) -> tuple[int, bytes, bytes]:
    command = boot.session.start(Command(args, **{"env": PATH, **options}))  # type: ignore[arg-type]
    pieces = list(command)
    if command.error is not None:
        raise command.error
    assert command.exit_code is not None
    return command.exit_code, *(b"".join(data for s, data in pieces if s == stream) for stream in ("stdout", "stderr"))


def test_cold_boot_and_restored_template_run_the_same(machines: Machines, root_disk: Path) -> None:
    seen = []
    for cold in (True, False):
        boot = machines.boot(root_disk, memory_mib=128, cold=cold)
        try:
            assert boot.start == ("cold" if cold else "template")
            assert boot.warnings == ()
            seen.append(run(boot, "sh", "-c", "uname -r; pwd; exit 3"))
        finally:
            boot.session.close()
    assert seen[0] == seen[1]
    assert seen[0][0] == 3
    assert boot.kernel.encode() in seen[0][1]


def test_streams_are_apart_and_binary_safe(running: Boot) -> None:
    assert run(running, "sh", "-c", r"printf '\0\377a'; echo err >&2") == (0, b"\0\xffa", b"err\n")


def test_environment_is_what_was_given_and_home(running: Boot) -> None:
    _, out, _ = run(running, "env", env=["PATH=/bin", "A=b c"], user="student")
    assert set(out.decode().splitlines()) == {"PATH=/bin", "A=b c", "HOME=/home/student"}


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "uid=0(root) gid=0(root)"),
        ("student", "uid=1000(student) gid=1000(student) groups=2000(lab)"),
        ("1000", "uid=1000(student) gid=1000(student)"),
        ("student:lab", "uid=1000(student) gid=2000(lab)"),
        ("77:88", "uid=77 gid=88"),
    ],
)
def test_users_are_looked_up_in_the_guest(running: Boot, user: str, expected: str) -> None:
    assert run(running, "id", user=user)[1].decode().startswith(expected)


def test_working_directory_is_made(running: Boot) -> None:
    assert run(running, "pwd", cwd="/made/up")[1] == b"/made/up\n"


def test_hostname_clock_and_entropy_are_set(running: Boot) -> None:
    assert run(running, "hostname")[1] == b"lab\n"
    seconds = int(run(running, "busybox", "date", "+%s")[1])
    assert abs(seconds - time.time()) < 30


def test_two_machines_of_one_template_draw_different_random_numbers(machines: Machines, root_disk: Path) -> None:
    drawn = set()
    for _ in range(2):
        boot = machines.boot(root_disk, memory_mib=128)
        try:
            drawn.add(run(boot, "dd", "if=/dev/urandom", "bs=16", "count=1")[1])
        finally:
            boot.session.close()
    assert len(drawn) == 2


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nosuch"], 127, "not found"),
        (["/bin/nosuch"], 127, "no such file"),
        (["/etc"], 126, "directory"),
        (["/etc/passwd"], 126, "denied"),
        (["/bin/plain"], 126, "denied"),
        (["script"], 127, "interpreter"),
    ],
)
def test_what_cannot_be_started(running: Boot, args: list[str], code: int, words: str) -> None:
    with pytest.raises(StartError, match=words) as caught:
        run(running, *args)
    assert caught.value.exit_code == code


def test_unknown_user(running: Boot) -> None:
    with pytest.raises(StartError, match="unable to find user nobody"):
        run(running, "true", user="nobody")


def test_more_stdin_than_any_buffer_comes_back(running: Boot) -> None:
    data = os.urandom(1 << 20)
    command = running.session.start(Command(["cat"], env=PATH, stdin=True))

    def feed() -> None:
        command.send(data)
        command.close_stdin()

    feeder = threading.Thread(target=feed)
    feeder.start()
    back = b"".join(piece for _, piece in command)
    feeder.join()
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
    assert command.exit_code == 0


def test_stdin_that_nobody_reads_does_not_block(running: Boot) -> None:
    command = running.session.start(Command(["true"], env=PATH, stdin=True))
    command.send(bytes(1 << 20))
    assert list(command) == []
    assert command.exit_code == 0


def test_a_signal_ends_a_command(running: Boot) -> None:
    command = running.session.start(Command(["sleep", "1000"], env=PATH))
    while command.started_at is None:
        with running.session.changed:
            running.session.changed.wait(1)
    command.kill(signal.SIGTERM)
    assert list(command) == []
    assert command.exit_code == 128 + signal.SIGTERM


def test_a_command_that_never_stops_writing_can_be_killed(running: Boot) -> None:
    command = running.session.start(Command(["busybox", "yes"], env=PATH))
    seen = 0
    for _, data in command:
        seen += len(data)
        if seen > 1 << 20:
            command.kill()
            break
    for _ in command:
        pass
    assert command.exit_code == 137


def test_commands_run_side_by_side(running: Boot) -> None:
    slow = running.session.start(Command(["cat"], env=PATH, stdin=True))
    assert run(running, "echo", "meanwhile")[1] == b"meanwhile\n"
    slow.close_stdin()
    assert list(slow) == []
    assert slow.exit_code == 0


def test_figures_from_both_sides(running: Boot) -> None:
    inside = running.session.inside()
    assert 0 < inside["memory_available_kib"] < inside["memory_total_kib"] < 128 * 1024
    outside = running.session.outside()
    assert outside is not None
    assert outside.cpu_s > 0
    assert outside.peak_rss_bytes >= outside.rss_bytes > 16 << 20


def test_what_a_guest_writes_is_thrown_away(machines: Machines, root_disk: Path) -> None:
    before = hashlib.sha256(subprocess.check_output(["head", "-c", "8M", root_disk])).digest()
    for _ in range(2):
        boot = machines.boot(root_disk, memory_mib=128)
        try:
            code, _, _ = run(boot, "sh", "-c", "test ! -e /tmp/mark && echo x > /tmp/mark && busybox sync")
            assert code == 0
        finally:
            boot.session.close()
    assert hashlib.sha256(subprocess.check_output(["head", "-c", "8M", root_disk])).digest() == before


def test_a_read_only_root_refuses_writes(machines: Machines, root_disk: Path) -> None:
    boot = machines.boot(root_disk, memory_mib=128, readonly=True)
    try:
        code, _, err = run(boot, "sh", "-c", "echo x > /tmp/mark")
        assert code != 0
        assert b"Read-only" in err
    finally:
        boot.session.close()


# -- what goes wrong


def test_a_damaged_template_is_replaced_by_a_cold_boot(machines: Machines, root_disk: Path, vm_dir: Path) -> None:
    made, _, found, _ = machines.prepare(memory_mib=112)
    path = template.template_path(vm_dir / "templates", made, kernel=f"{found.identity} {made.initramfs.name}")
    path.write_bytes(b"no migration")
    boot = machines.boot(root_disk, memory_mib=112)
    try:
        assert boot.start == "cold"
        assert boot.warnings
        assert run(boot, "true")[0] == 0
        assert not path.exists()
    finally:
        boot.session.close()


def silent_kernel(path: Path) -> None:
    """A PVH kernel of two instructions that never says anything."""
    code = b"\xfa\xf4\xeb\xfd"  # cli; 1: hlt; jmp 1b
    note = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", 0x100000)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0x100000, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    start = 64 + 2 * 56
    load = struct.pack("<IIQQQQQQ", 1, 5, start, 0x100000, 0x100000, len(code), len(code), 4)
    notes = struct.pack("<IIQQQQQQ", 4, 4, start + 16, 0, 0, len(note), len(note), 4)
    path.write_bytes(header + load + notes + code.ljust(16, b"\0") + note + b"Linux version 0.0-silent \0")


def test_a_guest_that_never_answers_meets_a_deadline(
    machines: Machines, root_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent_kernel(tmp_path / "vmlinux")
    monkeypatch.setenv(kernel.ENVIRONMENT, str(tmp_path / "vmlinux"))
    monkeypatch.setattr(machine, "READY_DEADLINE_S", {"tcg": 1.0, "kvm": 1.0})
    with pytest.raises(VMError, match="did not answer in time"):
        machines.boot(root_disk, memory_mib=128, cold=True)


def test_a_guest_that_panics_tells_its_last_words(
    machines: Machines, root_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "initramfs"
    broken.write_bytes(b"")
    monkeypatch.setattr(kernel, "get_initramfs", lambda *_: broken)
    with pytest.raises(VMError, match="ended before it was ready") as caught:
        machines.boot(root_disk, memory_mib=128, cold=True)
    assert "panic" in (caught.value.details or "")


def test_a_disk_that_holds_no_root(machines: Machines, tmp_path: Path) -> None:
    blank = tmp_path / "blank.img"
    blank.write_bytes(b"")
    os.truncate(blank, 8 << 30)
    with pytest.raises(VMError, match="could not mount its root"):
        machines.boot(blank, memory_mib=128)


def test_a_machine_that_is_killed_ends_its_commands(machines: Machines, root_disk: Path) -> None:
    boot = machines.boot(root_disk, memory_mib=128)
    command = boot.session.start(Command(["sleep", "1000"], env=PATH))
    os.kill(boot.session.process.pid, signal.SIGKILL)
    assert list(command) == []
    assert command.exit_code is None
    boot.session.close()
    assert boot.session.process.exit_status == -signal.SIGKILL


def test_without_qemu_the_remedy_is_named(
    machines: Machines, root_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VMError, match="QEMU is not installed") as caught:
        machines.boot(root_disk, memory_mib=128)
    assert "apt-get install" in (caught.value.resolution or "")


def test_qemu_dies_with_its_owner(machines: Machines, root_disk: Path, vm_dir: Path) -> None:
    program = """
        import contextlib, sys, time
        from pathlib import Path
        from labkernel.qemu.machine import Machines
        vm = Path(sys.argv[1])
        machines = Machines(vm, vm, lambda _: contextlib.nullcontext(), lambda _: None)
        print(machines.boot(Path(sys.argv[2]), memory_mib=128).session.process.pid, flush=True)
        time.sleep(1000)
    """
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(vm_dir), str(root_disk)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(machine.__file__).parents[2])},
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    held = os.pidfd_open(pid)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    import select

    assert select.select([held], [], [], 20)[0], "QEMU outlived its owner"
    os.close(held)


def test_kvm_is_not_used_where_the_probe_says_no(machines: Machines) -> None:
    verdict = machines.accelerator()
    made, _, _, _ = machines.prepare(memory_mib=128)
    assert made.accelerator == ("kvm" if verdict.usable else "tcg")


def test_a_second_processor(machines: Machines, root_disk: Path) -> None:
    boot = machines.boot(root_disk, memory_mib=128, cpus=2, cold=True)
    try:
        out = run(boot, "busybox", "nproc")[1]
        assert out == b"2\n"
    finally:
        boot.session.close()


def test_session_facts_are_plain_data(running: Boot) -> None:
    assert dataclasses.asdict(running.session.machine)["memory_mib"] == 128
