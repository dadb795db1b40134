"""QEMU's command line as data, unrun."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from labkernel.qemu.command import Machine, Port

TCG = Machine("qemu", "tcg", 256, Path("/k"), Path("/i"), Path("/d,1.qcow2"))


def following(argv: list[str], option: str) -> list[str]:
    return [argv[i + 1] for i, word in enumerate(argv) if word == option]


def test_tcg_keeps_its_translation_cache_small() -> None:
    assert following(TCG.argv(), "-accel") == ["tcg,tb-size=32"]


def test_kvm_uses_the_host_processor() -> None:
    argv = dataclasses.replace(TCG, accelerator="kvm").argv()
    assert following(argv, "-accel") == ["kvm"]
    assert following(argv, "-cpu") == ["host"]


def test_no_device_and_no_network_that_nobody_asked_for() -> None:
    argv = TCG.argv()
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(argv)
    assert not any("net" in word for word in argv if word.startswith(("-net", "user", "virtio-net")))


def test_the_disk_is_an_overlay_and_its_commas_survive() -> None:
    drive = following(TCG.argv(), "-drive")[0]
    assert "file=/d,,1.qcow2," in drive
    assert "format=qcow2" in drive


def test_published_ports_open_no_way_out() -> None:
    closed = dataclasses.replace(TCG, network="closed", ports=(Port("tcp", "127.0.0.1", 8080, 80),))
    assert following(closed.argv(), "-netdev") == ["user,id=net,ipv6=off,restrict=on,hostfwd=tcp:127.0.0.1:8080-:80"]
    assert "restrict" not in following(dataclasses.replace(TCG, network="open").argv(), "-netdev")[0]


def test_the_sandbox_forbids_spawning_unless_switched_off() -> None:
    assert "spawn=deny" in following(TCG.argv(), "-sandbox")[0]
    assert "-sandbox" not in dataclasses.replace(TCG, sandbox=False).argv()


def test_the_kernel_command_line_fits() -> None:
    assert len(TCG.kernel_command_line()) < 2048
    assert "acpi=off" in TCG.kernel_command_line()
    assert "acpi=off" not in dataclasses.replace(TCG, cpus=2).kernel_command_line()


def test_a_template_is_bound_to_the_hardware_and_not_to_disk_and_ports() -> None:
    key = TCG.template_key("facts")
    assert key == dataclasses.replace(TCG, disk=Path("/other"), sandbox=False).template_key("facts")
    assert key != dataclasses.replace(TCG, memory_mib=512).template_key("facts")
    assert key != TCG.template_key("other facts")
    network = dataclasses.replace(TCG, network="open")
    assert key != network.template_key("facts")
    published = dataclasses.replace(TCG, network="closed", ports=(Port("tcp", "", 1, 2),))
    assert network.template_key("facts") == published.template_key("facts")
