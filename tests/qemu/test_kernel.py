"""Kernels and their modules: order of loading, what is kept, and what is said when there is none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from labkernel.errors import VMError
from labkernel.qemu import guest, kernel


def silent(_line: str) -> None:
    pass


def module(directory: Path, name: str, depends: str = "") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0")


def test_modules_come_after_what_they_depend_on(tmp_path: Path) -> None:
    source = tmp_path / "6.1"
    module(source / "kernel/a", "virtio-pci", "virtio_ring,virtio")
    module(source / "kernel/b", "virtio", "virtio_ring")
    module(source / "kernel/b", "virtio_ring")
    module(source / "kernel", "virtio_blk", "virtio")
    module(source / "kernel", "virtio_console", "virtio")
    module(source / "net", "virtio_net", "virtio,failover")
    module(source / "net", "failover")
    (source / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    kernel._pack_modules(source, tmp_path / "out")
    order = (tmp_path / "out/order").read_text().split()
    assert order == ["virtio_ring.ko", "virtio.ko", "virtio_pci.ko", "virtio_blk.ko", "virtio_console.ko"]
    assert (tmp_path / "out/network").read_text().split() == ["failover.ko", "virtio_net.ko"]
    assert (tmp_path / "out/share").read_text() == ""


def test_a_kernel_without_virtio_is_refused(tmp_path: Path) -> None:
    module(tmp_path / "6.1", "something")
    with pytest.raises(VMError, match="lack virtio_pci"):
        kernel._pack_modules(tmp_path / "6.1", tmp_path / "out")


def test_a_named_file_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel.ENVIRONMENT, str(tmp_path / "nothing"))
    with pytest.raises(VMError, match="no such file"):
        kernel.get_kernel(tmp_path, notify=silent)


def test_a_named_file_that_is_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vmlinuz").write_bytes(bytes(4096))
    monkeypatch.setenv(kernel.ENVIRONMENT, str(tmp_path / "vmlinuz"))
    with pytest.raises(VMError, match="not a Linux kernel"):
        kernel.get_kernel(tmp_path, notify=silent)


def test_without_any_kernel_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernel.ENVIRONMENT, raising=False)
    monkeypatch.setattr(kernel, "_of_this_machine", lambda: iter(()))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VMError, match="no kernel") as caught:
        kernel.get_kernel(tmp_path, notify=silent)
    assert "LABKERNEL_VM_KERNEL" in (caught.value.resolution or "")
    with pytest.raises(VMError, match="no kernel"):
        kernel.describe(tmp_path)


def test_a_kernel_given_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(VMError, match=r"--kernel=.*no such file"):
        kernel.get_kernel(tmp_path, notify=silent, given=str(tmp_path / "nothing"))


def test_a_kept_kernel_is_found_without_fetching(kernels: Path) -> None:
    found = kernel.get_kernel(kernels, notify=silent, fetch=False)
    assert found.release in kernel.describe(kernels) or found.source in kernel.describe(kernels)
    assert found.format in ("vmlinux", "bzImage")


def test_the_init_says_what_it_is_on_the_host(vm_dir: Path, kernels: Path) -> None:
    done = subprocess.run([guest.get_init(vm_dir)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "first process" in done.stderr


def test_another_processor_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(VMError, match="x86_64 computer, this is aarch64"):
        guest.find_qemu()


def test_without_qemu_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VMError, match="not installed") as caught:
        guest.find_qemu()
    assert "apt-get install" in (caught.value.resolution or "")
