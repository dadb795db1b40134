"""KVM, whatever this machine has: the engine in a virtual machine whose emulated processor has AMD's SVM.

Under TCG QEMU emulates SVM with nested paging, so the distribution's kernel in a machine offers /dev/kvm, and machines
in that machine run under KVM as they would on bare metal, but for the speed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from innerengine import Context

from labkernel.engine import Engine
from labkernel.qemu import guest, kernel, unpack

TIMEOUT_S = 900
FIRMWARE = ("bios-256k.bin", "kvmvapic.bin", "pvh.bin", "linuxboot_dma.bin")
# Where QEMU is split into modules, below /usr/lib, and what it needs to run without KVM is one of them.
MODULES = "qemu/accel-tcg-x86_64.so"


def copy_firmware(root: Path) -> None:
    target = root / "usr/share/qemu"
    target.mkdir(parents=True)
    listed = subprocess.run([guest.find_qemu(), "-L", "help"], capture_output=True, text=True, check=True).stdout
    for name in FIRMWARE:
        found = next((Path(folder) / name for folder in listed.split() if (Path(folder) / name).exists()), None)
        if found is None:
            pytest.skip(f"QEMU has no {name} here")
        shutil.copy(found, target)
    for path in Path("/usr/lib").glob(f"*/{MODULES}"):
        (root / path.relative_to("/").parent).mkdir(parents=True)
        shutil.copy(path, root / path.relative_to("/"))


def copy_kvm(release: str, folder: Path, target: Path) -> None:
    """The kernel's KVM with all it depends on, in the order of loading. They come with the kernel's package only."""
    modules = Path("/lib/modules") / release
    if not modules.is_dir():
        got = subprocess.run(["apt-get", "download", f"linux-image-{release}"], cwd=folder, capture_output=True)
        archive = next(folder.glob("linux-image-*.deb"), None)
        if got.returncode or archive is None:
            pytest.skip(f"no modules of the kernel {release}, and its package is not to be had")
        subprocess.run(["dpkg-deb", "-x", str(archive), str(folder / "unpacked")], check=True)
        modules = next(folder.glob(f"unpacked/**/lib/modules/{release}"))
    files = {path.name.partition(".ko")[0].replace("-", "_"): path for path in modules.rglob("*.ko*")}
    builtin = {Path(line).stem.replace("-", "_") for line in (modules / "modules.builtin").read_text().split()}
    target.mkdir()
    order: list[str] = []

    def add(name: str) -> None:
        if name in builtin or name in order:
            return
        if name not in files:
            pytest.skip(f"the kernel {release} has no module {name}")
        data = unpack.module(files[name])
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends.group(1).decode().split(",") if depends else []:
            if other:
                add(other.replace("-", "_"))
        (target / name).write_bytes(data)
        order.append(name)

    add("kvm_amd")
    (target / "order").write_text("\n".join(order))


@pytest.fixture(scope="module")
def machine(shared_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image with this code, QEMU, a kernel and its KVM; skips where something of that is not to be had."""
    context = Context(shared_engine, tmp_path_factory.mktemp("nested"), Path(__file__).with_name("inside_kvm.py"))
    context.add_programs((guest.MACHINES["x86_64"], "mke2fs"))
    copy_firmware(context.root)
    kernels = shared_engine.layout.vm / "kernels"
    found = kernel.get_kernel(kernels, notify=lambda _line: None)
    copy_kvm(found.release, tmp_path_factory.mktemp("package"), context.root / "lab/modules")
    # As a store keeps it: to unpack it again in emulated code would take a minute.
    kept = context.root / "var/lab/vm/kernels" / found.image.parent.name
    shutil.copytree(found.image.parent, kept, ignore=shutil.ignore_patterns("loaded", "entry"))
    init = guest.get_init(shared_engine.layout.vm)
    if init.parent == shared_engine.layout.vm:
        shutil.copy2(init, context.root / "var/lab/vm")
    return context.build("nested")


@pytest.fixture(scope="module")
def found(shared_engine: Engine, machine: str) -> dict[str, Any]:
    command = ["python3", "/lab/inside_kvm.py"]
    result = shared_engine.vms.run(machine, command, mem_limit="1500m", remove=True, cold=True, timeout_s=TIMEOUT_S)
    sys.stderr.write(result.stderr.decode())  # how long each step took
    assert result.exit_code == 0, result.stderr.decode()
    answers: dict[str, Any] = json.loads(result.stdout)
    return answers


@pytest.mark.timeout(TIMEOUT_S + 60)
def test_the_probe_tells_what_it_found(found: dict[str, Any]) -> None:
    """The limits for real machines rightly say no to an emulated processor; with more patience a guest runs on it."""
    told = {name: found["verdicts"][name] for name in ("hurried", "kept", "asked", "asked kept", "another")}
    usable = {name: verdict[0] for name, verdict in told.items()}
    assert usable == {"hurried": False, "kept": False, "asked": True, "asked kept": True, "another": True}
    assert "there is no /dev/kvm" in found["verdicts"]["without"], "and a verdict without it does not last"
    assert "did not end in time" in told["hurried"][1] or "emulated" in told["hurried"][1]
    assert found["doctor"]["vm kvm"][0]
    assert "a guest ran at" in found["doctor"]["vm kvm"][1]


def test_a_verdict_is_kept_until_the_kernel_is_another(found: dict[str, Any]) -> None:
    verdicts = found["verdicts"]
    assert verdicts["kept"] == verdicts["hurried"], "patience came after that"
    assert verdicts["asked kept"] == verdicts["asked"]
    assert verdicts["another kernel"] == [True, False]
    assert verdicts["another"] != verdicts["asked"]
    assert verdicts["another kept"]


def test_a_machine_boots_under_kvm(found: dict[str, Any]) -> None:
    cold = found["cold"]
    assert cold["end"] == [7, "err\n", "typed", True, "cold"]
    assert cold["accelerator"] == ["kvm", found["doctor"]["vm kvm"][1]]
    assert "accelerator             KVM (a guest ran at" in cold["table"]
    assert cold["warnings"] == []
    assert cold["seconds"] == sorted(cold["seconds"])
    assert cold["clock"] == sorted(cold["clock"]), "the guest's clock is this machine's"


def test_a_machine_from_a_template_under_kvm_has_all_the_verbs(found: dict[str, Any]) -> None:
    lasting = found["lasting"]
    assert lasting["start"] == ["template", "kvm", []]
    assert lasting["repr"].endswith("KVM>")
    assert lasting["exec"] == [3, "kept\n"]
    assert lasting["logs"] == "up\n"
    inside, cpu, memory = lasting["figures"]
    assert 200 << 20 < inside <= 256 << 20
    assert cpu > 0
    assert memory > 16 << 20
    assert lasting["restored"] == ["snapshot", "kvm", 0, "kept"]
    assert lasting["clock"] == sorted(lasting["clock"])
    assert lasting["stopped"] == ["exited", 143]
    assert found["problems"] == []


def test_the_comparison_has_the_row_of_kvm(found: dict[str, Any]) -> None:
    compared = found["compared"]
    assert (compared["accelerator"], compared["start"], compared["no_vm"]) == ("kvm", "template", "")
    assert "VM (QEMU, KVM)" in compared["text"]
    assert "TCG" not in compared["text"]


def test_a_guest_that_does_not_come_up_in_time_is_started_without_kvm(found: dict[str, Any]) -> None:
    late = found["too_late"]
    assert late["reason"] == "a start under KVM failed: the guest did not answer in time"
    (warning,) = late["warnings"]
    assert "the cold start under KVM failed (the guest did not answer in time); a cold start under TCG" in warning
