"""A guest kernel and its few modules: found on the machine, kept from before, given, or fetched from Debian's archive.

    vm/kernels/<release>-<digest>/  one kept kernel, made once under a temporary name and renamed
    vm/kernels/given/…              the same for what LABKERNEL_VM_KERNEL named: used only while it names it
      kernel.json                   {"release", "source", "format": "vmlinux"|"bzImage"}
      image                         the uncompressed PVH ELF where the kernel has one, else the bzImage as it came
      modules/<name>.ko             uncompressed; modules/order lists them in the order of loading, modules/network and
                                modules/share what a network and shared directories need beyond that
      initramfs-<digest>.cpio       modules and the guest's init of one version

An uncompressed kernel saves a second of every boot under TCG, where the guest would unpack itself in emulated code.
Nothing here needs root. Source: kernel Documentation/x86/boot.rst (bzImage header), ELF gabi (notes),
Documentation/driver-api/early-userspace/buffer-format.rst (initramfs).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from labkernel.errors import VMError

from . import cpio, unpack

WANTED_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
# Loaded by the guest only when it is to have a network, or shared directories; a kernel may lack them.
OPTIONAL_MODULES = {"network": ("virtio_net",), "share": ("fuse",)}
_VERSION = 2  # of the contents of a kept kernel
_CRC32C = "crc32c_generic"  # ext4 as a module asks the crypto API for it by name, which no `depends` line tells
_PACKAGES = {"x86_64": "linux-image-cloud-amd64"}
_FETCH_TIMEOUT_S = 600
ENVIRONMENT = "LABKERNEL_VM_KERNEL"

Notify = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel ready to boot. `source` says where it came from, in words."""

    release: str
    image: Path
    modules: Path
    source: str
    format: str

    @property
    def identity(self) -> str:
        """Changes when the files do: goes into the key of a template."""
        info = self.image.stat()
        return f"{self.release}:{info.st_size}:{info.st_mtime_ns}"


@dataclasses.dataclass(frozen=True)
class _Candidate:
    vmlinuz: Path
    modules: Path | None
    source: str


def get_kernel(kernels: Path, *, notify: Notify, fetch: bool = True, given: str | None = None) -> Kernel:
    """The guest kernel to use; made ready under `kernels` (the store's vm/kernels) on first use.

    In this order: the file or directory `given`, what LABKERNEL_VM_KERNEL names, this machine's own, one kept from
    before, the distribution's cloud kernel by `apt-get download` (27 MB; only with `fetch`). Raises VMError with the
    way out.
    """
    if given:
        return _keep(_given(Path(given), "--kernel"), kernels / "given")
    named = os.environ.get(ENVIRONMENT)
    if named:
        return _keep(_given(Path(named)), kernels / "given")
    for candidate in _of_this_machine():
        try:
            return _keep(candidate, kernels)
        except (VMError, OSError):
            continue  # no virtio, or not readable: the next one
    kept = sorted(kernels.glob("*/kernel.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for entry in kept:
        try:
            return _read_kept(entry.parent)
        except (OSError, ValueError, KeyError):
            continue
    if fetch:
        return _fetch(kernels, notify)
    raise _no_kernel("none is kept in the store, and this machine has no readable one")


def describe(kernels: Path) -> str:
    """In words, which kernel a VM would get; nothing is fetched or made. Raises VMError when there is no way to one."""
    given = os.environ.get(ENVIRONMENT)
    if given:
        return _given(Path(given)).source
    own = next(_of_this_machine(), None)
    if own is not None:
        return own.source
    for entry in sorted(kernels.glob(f"*-{_VERSION}/kernel.json")):
        return f"{_read_kept(entry.parent).release}, kept in the store"
    if shutil.which("apt-get") and shutil.which("dpkg-deb") and platform.machine() in _PACKAGES:
        return f"{_PACKAGES[platform.machine()]} will be fetched with apt-get when it is first needed"
    raise _no_kernel("none is kept in the store, and there is no apt-get here to fetch one with")


def _no_kernel(details: str) -> VMError:
    package = _PACKAGES.get(platform.machine(), "linux-image")
    return VMError(
        "no kernel for virtual machines",
        details=details,
        resolution=f"install one (`apt-get install {package}`), or name a file: {ENVIRONMENT}=/path/to/vmlinuz",
    )


# -- where kernels come from


def _given(path: Path, option: str = ENVIRONMENT) -> _Candidate:
    if path.is_dir():
        images = sorted(path.glob("boot/vmlinuz-*")) or sorted(path.glob("vmlinuz*"))
        if not images:
            raise VMError(f"{option}={path}: no vmlinuz in this directory")
        return _Candidate(images[-1], path / "lib/modules", f"{option}={path}")
    if not path.is_file():
        raise VMError(f"{option}={path}: no such file", resolution="name a vmlinuz (bzImage) or a vmlinux")
    modules = path.parent.parent / "lib/modules"  # where a package unpacked by hand has them
    return _Candidate(path, modules if modules.is_dir() else None, f"{option}={path}")


def _of_this_machine() -> Iterator[_Candidate]:
    for image in sorted(Path("/boot").glob("vmlinuz-*"), reverse=True):
        if os.access(image, os.R_OK):
            yield _Candidate(image, Path("/lib/modules"), str(image))


def _fetch(kernels: Path, notify: Notify) -> Kernel:
    meta = _PACKAGES.get(platform.machine())
    if meta is None or not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise _no_kernel("and there is no apt-get here to fetch one with")
    package = _real_package(meta)
    notify(f"fetching the guest kernel: {package} (once, about 27 MB)")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=kernels) as name:
        _run(["apt-get", "download", package], cwd=Path(name))
        archive = next(Path(name).glob("*.deb"), None)
        if archive is None:
            raise _no_kernel(f"`apt-get download {package}` brought nothing")
        _run(["dpkg-deb", "-x", str(archive), f"{name}/x"], cwd=Path(name))
        image = next(Path(name).glob("x/boot/vmlinuz-*"), None)
        if image is None:
            raise _no_kernel(f"{archive.name} holds no kernel")
        return _keep(_Candidate(image, Path(name) / "x/lib/modules", f"Debian package {package}"), kernels)


def _real_package(meta: str) -> str:
    # The meta package is empty; what it depends on carries the version in its name.
    out = _run(["apt-cache", "depends", "--important", meta], cwd=None)
    found = re.search(r"Depends:\s+(linux-image-\S+)", out)
    if found is None:
        raise _no_kernel(f"apt knows no {meta}: its package lists may be empty (`apt-get update`)")
    return found.group(1)


def _run(argv: list[str], *, cwd: Path | None) -> str:
    env = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=_FETCH_TIMEOUT_S, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise _no_kernel(f"{argv[0]}: {err}") from err
    if done.returncode:
        raise _no_kernel(f"`{' '.join(argv)}` failed: {done.stderr.strip()[-400:]}")
    return done.stdout


# -- keeping one


def _read_kept(directory: Path) -> Kernel:
    facts = json.loads((directory / "kernel.json").read_text())
    if facts.get("version") != _VERSION:
        raise ValueError(f"{directory} was made by another version")
    kernel = Kernel(facts["release"], directory / "image", directory / "modules", facts["source"], facts["format"])
    kernel.image.stat()
    return kernel


def _keep(candidate: _Candidate, kernels: Path) -> Kernel:
    """Make `candidate` ready below `kernels`, unless it already is."""
    kernels.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = candidate.vmlinuz.stat()
    origin = [str(candidate.vmlinuz), info.st_size, info.st_mtime_ns]
    for entry in kernels.glob(f"*-{_VERSION}/kernel.json"):
        if json.loads(entry.read_text()).get("origin") == origin:
            return _read_kept(entry.parent)  # without reading the 8 MB again at each start
    data = candidate.vmlinuz.read_bytes()
    release = _release(data, candidate.vmlinuz)
    digest = hashlib.sha256(data).hexdigest()[:8]
    target = kernels / f"{release}-{digest}-{_VERSION}"
    if (target / "kernel.json").exists():
        return _read_kept(target)
    modules = candidate.modules or Path("/lib/modules")
    found = modules / release if (modules / release).is_dir() else modules
    work = Path(tempfile.mkdtemp(prefix=".new-", dir=kernels))
    try:
        image, form = unpack.vmlinux(data)
        (work / "image").write_bytes(image)
        _pack_modules(found, work / "modules")
        facts = {"version": _VERSION, "release": release, "source": candidate.source, "format": form, "origin": origin}
        (work / "kernel.json").write_text(json.dumps(facts))
        try:
            work.rename(target)
        except OSError:
            if not (target / "kernel.json").exists():  # else another process was faster with the same
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return _read_kept(target)


def _release(data: bytes, path: Path) -> str:
    if data[:4] == b"\x7fELF":
        found = re.search(rb"Linux version (\S+)", data)
        if found:
            return found.group(1).decode("ascii", "replace")
    elif data[0x202:0x206] == b"HdrS":
        start = 0x200 + struct.unpack_from("<H", data, 0x20E)[0]
        return data[start : start + 128].split(b"\0")[0].split(b" ")[0].decode("ascii", "replace")
    raise VMError(f"{path} is not a Linux kernel for this processor", resolution="a vmlinuz (bzImage) or vmlinux (ELF)")


def _pack_modules(source: Path, target: Path) -> None:
    files: dict[str, Path] = {}
    for path in sorted(source.rglob("*.ko*")):
        files.setdefault(_module_name(path.name), path)
    builtin_list = source / "modules.builtin"
    text = builtin_list.read_text() if builtin_list.exists() else ""
    builtin = {_module_name(line.rpartition("/")[2]) for line in text.split()}
    target.mkdir()
    order: list[str] = []
    wanted = list(WANTED_MODULES)
    if "ext4" in files:
        wanted.insert(0, _CRC32C)
    for name in wanted:
        if files or text:
            _add_module(name, files, builtin, order, target)
    _write_list(target / "order", order)
    for listing, names in OPTIONAL_MODULES.items():
        more = list(order)
        for name in names:
            if name in files:
                _add_module(name, files, builtin, more, target)
        _write_list(target / listing, more[len(order) :])


def _write_list(path: Path, names: list[str]) -> None:
    path.write_text("".join(f"{name}.ko\n" for name in names))


def _module_name(file_name: str) -> str:
    return file_name.partition(".ko")[0].replace("-", "_")


def _add_module(name: str, files: dict[str, Path], builtin: set[str], order: list[str], target: Path) -> None:
    """Put `name` after all it depends on. The `depends` line in the module itself spares us depmod."""
    if name in builtin or name in order:
        return
    path = files.get(name)
    if path is None:
        if name == _CRC32C:
            return
        raise VMError(f"the kernel's modules lack {name}", resolution="take a kernel with virtio, e.g. a cloud kernel")
    data = unpack.module(path)
    found = re.search(rb"\0depends=([^\0]*)\0", data)
    for dependency in found.group(1).decode().split(",") if found else []:
        if dependency:
            _add_module(dependency.replace("-", "_"), files, builtin, order, target)
    (target / f"{name}.ko").write_bytes(data)
    order.append(name)


def get_initramfs(kernel: Kernel, init: Path) -> Path:
    """The cpio archive with the kernel's modules and `init` as /init; built once for each version of the init."""
    program = init.read_bytes()
    path = kernel.modules.parent / f"initramfs-{hashlib.sha256(program).hexdigest()[:12]}.cpio"
    if path.exists():
        return path
    archive = cpio.Archive()
    archive.directory("dev")
    # init's own messages need a console before it has mounted anything.
    archive.device("dev/console", 5, 1)
    archive.file("init", program, mode=0o755)
    archive.directory("modules")
    for entry in sorted(kernel.modules.iterdir()):
        archive.file(f"modules/{entry.name}", entry.read_bytes())
    with tempfile.NamedTemporaryFile(prefix=".cpio-", dir=path.parent, delete=False) as out:
        out.write(archive.finish())
    os.replace(out.name, path)
    return path
