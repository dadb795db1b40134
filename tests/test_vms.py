"""Images as virtual machines, through the engine and from other processes. Booting costs seconds, so one machine serves
most tests; `box` is it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from waiting import wait_until

from labkernel.engine import Engine
from labkernel.errors import (
    ConflictError,
    LabkernelError,
    NoSuchImage,
    NoSuchVM,
    StartError,
    UsageError,
    VMError,
)
from labkernel.metrics import Sampler
from labkernel.qemu import guest, kernel
from labkernel.vms import VM, VMResult

IMAGE = "lab/busybox"
MEMORY = "128m"
DEADLINE_S = 120.0
TICKS = "echo hello; i=0; while sleep 0.2; do i=$((i+1)); echo $i > /ticks; done"


@pytest.fixture(scope="module")
def lab(vm_lab: Engine) -> Engine:
    return vm_lab


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shared")
    (path / "a").write_text("from the host\n")
    return path


@pytest.fixture(scope="module")
def box(lab: Engine, shared: Path) -> VM:
    found = lab.vms.run(
        IMAGE,
        ["sh", "-c", TICKS],
        detach=True,
        name="box",
        hostname="lab",
        mem_limit=MEMORY,
        environment={"A": "b c"},
        volumes=[f"{shared}:/data", f"{shared / 'a'}:/etc/one:ro"],
        ports={"80/tcp": ("127.0.0.1", None)},
        labels={"lab": "vm"},
    )
    assert isinstance(found, VM)
    return found


def others(lab: Engine) -> list[VM]:
    return [vm for vm in lab.vms.list(all=True) if vm.name != "box"]


def output(vm: VM, *words: str, **options: object) -> str:
    code, data = vm.exec_run(list(words), **options)
    assert code == 0, data
    return str(data.decode())


# -- one machine, looked at from all sides ---------------------------------------------------------------------------


def test_it_is_listed_shown_and_found(lab: Engine, box: VM) -> None:
    assert box.status == "running"
    assert lab.vms.get("box") == lab.vms.get(box.id[:8]) == box
    assert [vm.name for vm in lab.vms.list(filters={"label": "lab=vm"})] == ["box"]
    assert "box" in repr(lab.vms.list())
    assert "<table" in box._repr_html_()
    attrs = box.attrs
    assert attrs["State"]["Running"]
    assert attrs["Machine"]["Accelerator"] in ("tcg", "kvm")
    assert attrs["NetworkSettings"]["Ports"] == box.ports
    assert attrs["Machine"]["Kernel"] == output(box, "uname", "-r").strip()
    with pytest.raises(ConflictError, match="already in use"):
        lab.vms.run(IMAGE, "true", detach=True, name="box", mem_limit=MEMORY)
    with pytest.raises(NoSuchVM):
        lab.vms.get("nosuch")
    assert lab.check() == []


def test_commands_run_beside_its_own(box: VM) -> None:
    code, both = box.exec_run(["sh", "-c", "echo out; echo err >&2; exit 4"], demux=True)
    assert (code, both) == (4, (b"out\n", b"err\n"))
    assert output(box, "sh", "-c", "hostname; echo $A; pwd", workdir="/made/up") == "lab\nb c\n/made/up\n"
    assert abs(int(output(box, "date", "+%s")) - time.time()) < 60
    assert output(box, "id", "-u", user="nobody") == "65534\n"
    assert output(box, "sh", "-c", r"printf '\0\377' | od -An -tx1").split() == ["00", "ff"]


def test_its_clock_goes_as_fast_as_this_machines(box: VM) -> None:
    def uptime_s() -> float:
        return float(output(box, "cat", "/proc/uptime").split()[0])

    before, first, between = time.monotonic(), uptime_s(), time.monotonic()
    time.sleep(1)
    later, last, after = time.monotonic(), uptime_s(), time.monotonic()
    # A guest that measured its counter by itself on a busy machine was 13 times too fast.
    assert (later - between) * 0.98 - 0.02 <= last - first <= (after - before) * 1.02 + 0.02


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [("nosuch", 127, "not found"), ("/etc", 126, "directory"), ("/etc/passwd", 126, "denied")],
)
def test_what_cannot_be_started_has_dockers_exit_codes(box: VM, command: str, code: int, words: str) -> None:
    with pytest.raises(StartError, match=words) as caught:
        box.exec_run([command])
    assert caught.value.exit_code == code
    with pytest.raises(StartError, match="unable to find user"):
        box.exec_run("true", user="nosuch")


def test_more_stdin_than_any_buffer_comes_back(box: VM) -> None:
    data = os.urandom(700_000)
    attachment = box.open_exec(["cat"], stdin=True)

    def feed() -> None:
        attachment.send(data)
        attachment.close_stdin()

    threading.Thread(target=feed, daemon=True).start()
    with attachment:
        assert b"".join(piece for _, piece in attachment) == data
    assert attachment.exit_code == 0


def test_a_reader_that_waits_makes_the_guest_wait(box: VM) -> None:
    attachment = box.open_exec(["sh", "-c", "head -c 6000000 /dev/zero; echo end >&2"])
    assert output(box, "echo", "another is served meanwhile") == "another is served meanwhile\n"
    with attachment:
        pieces = list(attachment)
    assert sum(len(data) for stream, data in pieces if stream == "stdout") == 6_000_000
    assert pieces[-1] == ("stderr", b"end\n") or ("stderr", b"end\n") in pieces


def test_a_terminal_with_a_size(box: VM) -> None:
    attachment = box.open_exec(["sh", "-c", "tty; read line; stty size; echo got $line"], tty=True, stdin=True)
    seen = bytearray()
    with attachment:
        attachment.resize(33, 77)
        attachment.send(b"typed\n")
        for _, data in attachment:
            seen += data
    assert b"/dev/pts/" in seen
    assert b"33 77" in seen
    assert b"got typed" in seen
    assert attachment.exit_code == 0


def test_directories_are_shared_both_ways(box: VM, shared: Path) -> None:
    assert output(box, "cat", "/data/a", "/etc/one") == "from the host\nfrom the host\n"
    assert box.exec_run(["sh", "-c", "echo x > /etc/one"]).exit_code != 0
    output(box, "sh", "-c", "mkdir -p /data/d/e && cp /bin/busybox /data/d/e/ && mv /data/d/e /data/f && ls -l /data")
    assert (shared / "f/busybox").stat().st_size > 100_000
    (shared / "later").write_text("later\n")
    assert output(box, "cat", "/data/later") == "later\n"
    assert output(box, "sh", "-c", "cmp /data/f/busybox /bin/busybox && rm -r /data/f && echo same") == "same\n"
    assert not (shared / "f").exists()


def test_a_published_port_leads_in_and_nothing_leads_out(box: VM) -> None:
    output(box, "sh", "-c", "mkdir -p /www && echo page > /www/index.html && httpd -p 80 -h /www")
    port = int(box.ports["80/tcp"][0]["HostPort"])
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.endswith(b"page\n")
    with socket.create_server(("127.0.0.1", 0)) as ours:
        inside = f"10.0.2.2 {ours.getsockname()[1]}"
        assert box.exec_run(["sh", "-c", f"echo x | timeout 3 nc {inside}"]).exit_code != 0


def test_figures_from_outside_and_inside(lab: Engine, box: VM) -> None:
    sample = box.sample()
    assert sample is not None
    assert sample.memory_bytes > 16 << 20
    assert box.inside()["memory_total_kib"] < 128 * 1024
    stats = box.stats()
    assert stats["memory_stats"]["usage"] > 16 << 20
    if lab.driver.cgroups.get("memory") == "kernel":
        assert stats["memory_stats"]["limit"] == (128 + 256) << 20


def test_a_snapshot_is_gone_back_to(box: VM, shared: Path) -> None:
    wait_until(lambda: box.exec_run("test -s /ticks").exit_code == 0, "the first tick")
    output(box, "sh", "-c", "echo before > /state; exec 9> /data/open; echo one >&9; sleep 1000 9>&- >/dev/null &")
    beside = [box.open_exec(["sleep", "1000"]), box.open_exec(["sh", "-c", "while true; do cat /data/a; done"])]
    assert box.snapshot("one") == "one"
    before = int(output(box, "cat", "/ticks"))
    wait_until(lambda: int(output(box, "cat", "/ticks") or 0) > before, "it goes on")
    output(box, "sh", "-c", "echo after > /state")
    box.restore("one")
    assert (box.status, box.booted, box.snapshots) == ("running", "snapshot", ["one"])
    for _ in range(4):  # none is taken for one of those that the restore ends
        assert output(box, "cat", "/state", "/data/a") == "before\nfrom the host\n"
    for attachment in beside:
        attachment.close()
    assert abs(int(output(box, "date", "+%s")) - time.time()) < 60
    now = int(output(box, "cat", "/ticks") or 0)
    wait_until(lambda: int(output(box, "cat", "/ticks") or 0) > now, "it goes on where it was")
    with pytest.raises(UsageError, match="snapshot name"):
        box.snapshot("../two")
    with pytest.raises(VMError, match="has no snapshot two"):
        box.restore("two")
    box.remove_snapshot("one")
    assert box.snapshots == []


def test_another_process_finds_it_and_may_end_the_supervisor(lab: Engine, box: VM) -> None:
    code = (
        "import sys; from labkernel.engine import Engine\n"
        "lab = Engine.open(sys.argv[1], runtime_dir=sys.argv[2]); vm = lab.vms.get('box')\n"
        "print(vm.status, vm.exec_run('echo there').output, vm.logs().split()[0])"
    )
    argv = [sys.executable, "-c", code, str(lab.layout.root), str(lab.layout.runtime_dir)]
    expected = "running b'there\\n' b'hello'"
    assert subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S).stdout.strip() == expected
    qemu = box.pid
    info = lab.runtime.ensure()
    os.kill(info.pid, signal.SIGKILL)
    assert subprocess.run(argv, capture_output=True, text=True, timeout=DEADLINE_S).stdout.strip() == expected
    assert (box.status, box.pid) == ("running", qemu)


def test_the_command_line_has_dockers_verbs(lab: Engine, box: VM) -> None:
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(lab.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(lab.layout.runtime_dir),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }

    def labkernel(*words: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "labkernel.cli", "vm", *words]
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=DEADLINE_S, input="typed\n")

    header, line = labkernel("ps").stdout.splitlines()
    assert (header.split()[0], line.split()[-1]) == ("VM", "box")
    done = labkernel("exec", "-i", "-w", "/tmp", "-e", "B=2", "box", "sh", "-c", "pwd; echo $B; cat; exit 6")
    assert (done.returncode, done.stdout) == (6, "/tmp\n2\ntyped\n")
    assert labkernel("logs", "box").stdout == "hello\n"
    assert labkernel("port", "box").stdout.startswith("80/tcp -> 127.0.0.1:")
    assert labkernel("inspect", "-f", "{{.Machine.Start}}", "box").stdout.strip() == box.booted
    done = labkernel("rm", "box")
    assert (done.returncode, done.stderr.partition("\n")[0]) == (
        1,
        'labkernel: cannot remove VM "box": it is running: stop it before removing or force remove',
    )
    assert labkernel("cp", "box:/x", ".").returncode == 1


def test_stopped_and_started_again_its_disk_is_there(lab: Engine, box: VM) -> None:
    output(box, "sh", "-c", "echo kept > /kept")
    box.stop(timeout=30)
    assert (box.status, box.pid, box.sample()) == ("exited", None, None)
    assert box.wait()["StatusCode"] == box.exit_code == 143
    with pytest.raises(ConflictError, match="not running"):
        box.exec_run("true")
    assert box.logs().startswith(b"hello\n")
    assert box not in lab.vms.list()
    assert box in lab.vms.list(all=True)
    box.start()
    assert output(box, "cat", "/kept") == "kept\n"
    qemu = box.pid
    assert qemu is not None
    box.kill()
    wait_until(lambda: not os.path.exists(f"/proc/{qemu}"), "QEMU is gone")
    assert box.exit_code == 137
    box.remove()
    with pytest.raises(NoSuchVM):
        lab.vms.get("box")


# -- runs in the foreground ------------------------------------------------------------------------------------------


def test_the_same_image_and_command_with_a_kernel_of_its_own(lab: Engine) -> None:
    live: list[tuple[str, bytes]] = []
    seen: list[VM] = []
    with Sampler(hz=50) as sampler:

        def started(vm: VM) -> None:
            sampler.add(vm, name="vm")
            seen.append(vm)

        result = lab.vms.run(
            IMAGE,
            ["sh", "-c", "uname -r; id -u; pwd; echo $A; cat; echo err >&2; sleep 0.5; exit 5"],
            mem_limit=MEMORY,
            cold=True,
            environment={"A": "b"},
            user="nobody",
            working_dir="/tmp",
            read_only=True,
            stdin=b"typed\n",
            on_output=lambda stream, data: live.append((stream, data)),
            on_start=started,
        )
        series = sampler.series("vm")
    assert isinstance(result, VMResult)
    assert (result.exit_code, result.start) == (5, "cold")
    assert result.stdout.decode().split() == [result.kernel, "65534", "/tmp", "b", "typed"]
    assert result.stderr == b"err\n"
    assert b"".join(data for stream, data in live if stream == "stdout") == result.stdout
    assert 0 < result.timings["ready_s"] < result.timings["exec_s"] < result.timings["wall_s"]
    assert result.usage.cpu_s > 0
    assert result.usage.peak_rss_bytes > 16 << 20
    assert result.usage.inside["maxrss_kib"] > 0
    assert result.disk_bytes > 0
    assert result.accelerator.upper() in repr(result)
    assert "<table" in result._repr_html_()
    assert series.kind == "vm"
    assert series.samples
    assert seen[0].status == "removed"
    assert others(lab) == []


def test_two_machines_of_one_template_draw_different_random_numbers(lab: Engine) -> None:
    command = ["sh", "-c", "head -c 16 /dev/urandom | od -An -tx1; touch /kept"]
    drawn = [lab.vms.run(IMAGE, command, mem_limit=MEMORY) for _ in range(2)]
    assert drawn[0].start == drawn[1].start == "template"
    assert drawn[0].stdout != drawn[1].stdout


def test_a_damaged_template_is_replaced_by_a_cold_boot(lab: Engine) -> None:
    lab.vms.run(IMAGE, "true", mem_limit=MEMORY)
    for path in (lab.layout.vm / "templates").glob("*.vm"):
        path.write_bytes(path.read_bytes()[:4096])
    result = lab.vms.run(IMAGE, "true", mem_limit=MEMORY)
    assert (result.exit_code, result.start) == (0, "cold")
    assert "from the template under" in result.warnings[0]


def test_a_time_limit_ends_the_machine(lab: Engine) -> None:
    with pytest.raises(VMError, match="did not end within"):
        lab.vms.run(IMAGE, "sleep 1000", mem_limit=MEMORY, timeout_s=4)
    assert others(lab) == []


def test_who_waits_for_a_machine_that_is_removed_is_told(lab: Engine) -> None:
    machine = lab.vms.create(IMAGE, ["sleep", "60"], cold=True, mem_limit=MEMORY)
    told: list[BaseException] = []

    def start() -> None:
        try:
            machine.start()
        except LabkernelError as err:
            told.append(err)

    waiting = threading.Thread(target=start)
    waiting.start()

    def stopped() -> bool:
        monitor = int(lab.runtime.states([machine.id])[machine.id]["pid"])
        if monitor:
            os.kill(monitor, signal.SIGSTOP)  # else a fast guest could be up before this test is
        return bool(monitor)

    wait_until(stopped, "its monitor")
    lab.vms.get(machine.id).remove(force=True)
    waiting.join(60)
    assert [str(err).splitlines()[0] for err in told] == ["it was ended while it started"]
    assert machine.id not in {each.id for each in lab.vms.list(all=True)}


def test_an_interrupt_ends_the_machine(lab: Engine) -> None:
    pids: list[int | None] = []

    def interrupt(_stream: str, _data: bytes) -> None:
        pids.append(others(lab)[0].pid)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        lab.vms.run(IMAGE, ["sh", "-c", "echo up; sleep 1000"], mem_limit=MEMORY, on_output=interrupt)
    assert pids[0]
    wait_until(lambda: not os.path.exists(f"/proc/{pids[0]}"), "QEMU is gone")
    assert others(lab) == []


def test_a_machine_in_the_foreground_dies_with_who_started_it(lab: Engine) -> None:
    code = (
        "import sys; from labkernel.engine import Engine\n"
        "lab = Engine.open(sys.argv[1], runtime_dir=sys.argv[2])\n"
        "lab.vms.run('lab/busybox', ['sh', '-c', 'echo up; sleep 1000'], mem_limit='128m', name='tied',"
        " on_output=lambda s, d: print(lab.vms.get('tied').pid, flush=True))"
    )
    argv = [sys.executable, "-c", code, str(lab.layout.root), str(lab.layout.runtime_dir)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None
        pid = int(client.stdout.readline())
        assert os.path.exists(f"/proc/{pid}")
        client.kill()
    wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "QEMU is gone")
    wait_until(lambda: others(lab) == [], "the machine is removed")


def test_a_guest_that_ends_early_tells_its_last_words(lab: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABKERNEL_VM_ACCEL", "tcg")
    vm = lab.vms.create(IMAGE, "true", mem_limit=MEMORY, cold=True)
    lab.vms.prepare(vm)
    config = json.loads((vm.directory / "config.json").read_text())
    for attempt in config["labkernel"]["machine"]["attempts"]:
        attempt["argv"] = [word.replace("-drive", "-nosuchoption") for word in attempt["argv"]]
    (vm.directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(VMError, match="ended before it was ready") as caught:
        lab.vms.begin(vm, lambda: lab.runtime.start(vm.id))
    assert "nosuchoption" in (caught.value.details or "")
    vm.remove(force=True)


@pytest.mark.usefixtures("box")  # its kernel
def test_a_plain_user_has_machines_too(lab: Engine, plain_user: Any) -> None:
    kept = next((lab.layout.vm / "kernels").glob("**/kernel.json")).parent
    place = plain_user.home / "kernel"
    modules = place / "lib/modules" / json.loads((kept / "kernel.json").read_text())["release"]
    modules.mkdir(parents=True)
    shutil.copytree(kept / "modules", modules, dirs_exist_ok=True)
    there = {path.stem for path in modules.glob("*.ko")}
    builtin = [f"kernel/{name}.ko" for name in (*kernel.WANTED_MODULES, "fuse") if name not in there]
    (modules / "modules.builtin").write_text("\n".join(builtin))
    (place / "boot").mkdir()
    shutil.copy(kept / "image", place / "boot/vmlinuz-kept")
    (plain_user.home / "shared").mkdir(mode=0o777)
    (plain_user.home / "shared").chmod(0o777)
    words = ["vm", "run", "--rm", "--cold", "-m", MEMORY, "-v", "./shared:/d", "--kernel", "kernel/boot/vmlinuz-kept"]
    done = plain_user.labkernel(*words, IMAGE, "sh", "-c", "id -u; echo mine > /d/file; exit 3", timeout_s=DEADLINE_S)
    assert (done.returncode, done.stdout) == (3, "0\n"), done.stderr
    assert (plain_user.home / "shared/file").read_text() == "mine\n"
    made = plain_user.labkernel("network", "create", "own")
    if made.returncode:  # the driver proot
        assert "has no networks" in made.stderr
    else:
        serve = ("httpd", "-f", "-p", "80", "-h", "/etc")
        served = plain_user.labkernel("run", "-d", "--name", "web", "--network", "own", IMAGE, *serve)
        assert served.returncode == 0, served.stderr
        words = ["vm", "run", "--rm", "--cold", "-m", MEMORY, "--network", "own", "--kernel", words[-1], IMAGE]
        done = plain_user.labkernel(
            *words, "timeout", "30", "wget", "-qO-", "http://web/hostname", timeout_s=DEADLINE_S
        )
        assert (done.returncode, done.stdout.strip()) == (0, served.stdout.strip()[:12]), done.stderr
        words = [word for word in words if word not in ("--rm", "--network", "own")]
        done = plain_user.labkernel(
            "vm", "run", "-d", "--name", "late", *words[2:], "sleep", "600", timeout_s=DEADLINE_S
        )
        assert done.returncode == 0, done.stderr
        connected = plain_user.labkernel("network", "connect", "own", "late")
        assert connected.returncode == 0, connected.stderr
        fetched = plain_user.labkernel("vm", "exec", "late", "timeout", "30", "wget", "-qO-", "http://web/hostname")
        assert (fetched.returncode, fetched.stdout.strip()) == (0, served.stdout.strip()[:12]), fetched.stderr
        plain_user.labkernel("vm", "rm", "-f", "late")
        plain_user.labkernel("rm", "-f", "web")
        plain_user.labkernel("network", "rm", "own")
    assert plain_user.labkernel("system", "check").stdout.startswith("nothing inconsistent")


def test_a_disk_of_many_layers_where_no_overlay_can_be_mounted(tmp_path: Path, needs: Any) -> None:
    """In a pod without namespaces each image that was built has more than one layer."""
    needs("vm mke2fs", "proot")
    (tmp_path / "one").write_text("first")
    (tmp_path / "two").write_text("second")
    base = Path(tempfile.mkdtemp(prefix="lk-v-", dir="/tmp"))
    lab = Engine.open(base / "root", runtime_dir=base / "run", driver="proot")
    try:
        lab.builds.build("FROM lab/busybox\nCOPY one /one\nCOPY two /one\n", context=tmp_path, tags=["many"])
        path, _size = lab.vms._disk(lab.images.get("many"), print)
        debugfs = shutil.which("debugfs", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")  # beside mke2fs
        seen = subprocess.run([str(debugfs), "-R", "cat /one", path], capture_output=True, text=True, check=True)
        assert seen.stdout == "second"
        assert sorted(path.parent.iterdir()) == [path]
    finally:
        lab.runtime.shutdown(force=True)
        lab.close()
        shutil.rmtree(base)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mem_limit": "32m"}, "a guest kernel needs at least"),
        ({"mem_limit": "much"}, "invalid size"),
        ({"cpus": 0}, "processors"),
        ({"cpus": 10_000}, "processors"),
        ({"cap_add": ["NET_ADMIN"]}, "no setting of a virtual machine"),
        ({"network_mode": "host"}, "not available to a virtual machine"),
        ({"name": "-bad-"}, "name"),
        ({"timeout_s": 0}, "time limit"),
    ],
)
def test_bad_settings_are_refused_before_anything_starts(
    shared_engine: Engine, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        shared_engine.vms.run(IMAGE, "true", **settings)


def test_unknown_image_kernel_and_root(lab: Engine, tmp_path: Path) -> None:
    with pytest.raises(NoSuchImage):
        lab.vms.run("lab/nothing-of-the-kind", "true")
    with pytest.raises(VMError, match="no such file"):
        lab.vms.run(IMAGE, "true", kernel=tmp_path / "vmlinuz")
    if lab.driver.name == "root":
        with pytest.raises(VMError, match="lab/host"):
            lab.vms.run("lab/host", "true", mem_limit=MEMORY)
    assert others(lab) == []


def test_without_qemu_or_kernel_the_remedy_is_named(
    shared_engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(guest, "find_qemu", lambda: str(tmp_path / "qemu"))
    monkeypatch.setattr(kernel, "_of_this_machine", lambda: iter(()))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(kernel.ENVIRONMENT, raising=False)
    with pytest.raises(VMError) as caught:
        kernel.get_kernel(tmp_path, notify=lambda _line: None)
    assert "apt-get install" in (caught.value.resolution or "")


def test_the_probe_gives_every_cause_in_words(shared_engine: Engine) -> None:
    found = {capability.name: capability for capability in shared_engine.vms.probe()}
    assert set(found) == {"vm qemu", "vm init", "vm mke2fs", "vm kernel", "vm kvm"}
    assert all(capability.cause for capability in found.values())
    names = [capability.name for capability in shared_engine.doctor()]
    assert len(names) == len(set(names))
    assert not {"qemu", "mke2fs"} & set(names)


def test_prune_only_costs_time(lab: Engine) -> None:
    vm = lab.vms.create(IMAGE, "true", mem_limit=MEMORY)
    answer = lab.vms.prune(all=True)
    assert vm.id in answer["VMsDeleted"]
    assert answer["SpaceReclaimed"] > 0
    assert list(lab.layout.vm.glob("templates/*")) == []
