"""Where everything lies: the store below LABKERNEL_ROOT and the short-lived files below LABKERNEL_RUNTIME_DIR.

    root/                           default: the user's data directory, 0700
      oci-layout                    marks an OCI image layout (image-spec image-layout.md)
      blobs/<algorithm>/<hex>       content, named by digest, never changed
      layers/<diff id hex>/         unpacked layers: overlay lower directories, a cache that blobs can rebuild
      containers/<id>/              config.json, state.json, log.json, upper/, work/
      volumes/<name>/_data
      vm/                           kernels/ disks/ templates/
      rebuilds/                     what `labkernel build` answers at once while nothing has changed
      tmp/                          flock'ed by their writers; what nobody locks is rubbish
      locks/  labkernel.db
      reserve                       space for the database when the disk is full
    runtime_dir/                    sockets and pid files; gone after a reboot, 0700

The layout only names and makes directories. What may be in them is known to `blobs`, `database` and the services.
"""

from __future__ import annotations

import ctypes
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from labkernel.errors import StoreError

from . import places

SOCKET_PATH_MAX = 107
"""Longest path of a unix socket in bytes: sun_path holds 108 with its final zero (man 7 unix)."""

OCI_LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'

_DIRECTORIES = (
    "blobs/sha256",
    "layers",
    "containers",
    "volumes",
    "vm/kernels",
    "vm/disks",
    "vm/templates",
    "vm/machines",
    "tmp",
    "locks",
)

# Magic numbers of file systems shared between machines (linux/magic.h and the modules' own headers). SQLite's WAL index
# is shared memory, so a database on them must use the rollback journal; FUSE is here because of sshfs and its kin.
_SHARED_FILE_SYSTEMS = {
    0x6969: "nfs",
    0x517B: "smb",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x01021997: "9p",
    0x5346414F: "afs",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
    0x65735546: "fuse",
}


@dataclass(frozen=True)
class Layout:
    """The two directories of one store. `Layout.find()` is the usual way to get one."""

    root: Path
    runtime_dir: Path

    @classmethod
    def find(
        cls, root: str | os.PathLike[str] | None = None, runtime_dir: str | os.PathLike[str] | None = None
    ) -> Layout:
        """The store that the arguments, LABKERNEL_ROOT / LABKERNEL_RUNTIME_DIR or the defaults name, in that order.

        Makes what is missing (0700). Raises StoreError when a directory cannot be made, belongs to somebody else, or
        would give socket paths longer than the kernel takes.
        """
        store = places.find_root(root)
        layout = cls(Path(store), Path(places.find_runtime_dir(store, runtime_dir)))
        layout._make()
        return layout

    @property
    def blobs(self) -> Path:
        return self.root / "blobs"

    @property
    def layers(self) -> Path:
        return self.root / "layers"

    @property
    def containers(self) -> Path:
        return self.root / "containers"

    @property
    def volumes(self) -> Path:
        return self.root / "volumes"

    @property
    def vm(self) -> Path:
        return self.root / "vm"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def database(self) -> Path:
        return self.root / "labkernel.db"

    @property
    def socket(self) -> Path:
        return self.runtime_dir / "supervisor.sock"

    def container_dir(self, id: str) -> Path:
        """Directory of the container with the full 64-digit id."""
        return self.root / "containers" / id

    def vm_dir(self, id: str) -> Path:
        """Directory of the virtual machine with the full 64-digit id."""
        return self.root / "vm" / "machines" / id

    def layer_dir(self, diff_id: str) -> Path:
        """Unpacked layer with this diff ID (`sha256:` + hex)."""
        return self.root / "layers" / diff_id.rpartition(":")[2]

    def blob_path(self, digest: str) -> Path:
        """File of the blob with this digest (`algorithm:hex`, already validated)."""
        algorithm, _, encoded = digest.partition(":")
        return self.root / "blobs" / algorithm / encoded

    def _make(self) -> None:
        try:
            marker = self.root / "oci-layout"
            if not marker.exists():
                _private_directory(self.root)
                for name in _DIRECTORIES:
                    (self.root / name).mkdir(parents=True, exist_ok=True)
                # Last, so that a half-made store is completed by the next opener.
                marker.write_bytes(OCI_LAYOUT)
            _private_directory(self.runtime_dir)
        except OSError as err:
            raise StoreError(
                f"cannot make the store: {err.filename or self.root}: {err.strerror}",
                resolution="set LABKERNEL_ROOT (and LABKERNEL_RUNTIME_DIR) to directories you may write",
            ) from err
        if len(os.fsencode(self.socket)) > SOCKET_PATH_MAX:
            raise StoreError(
                f"{self.socket} is too long for a unix socket ({SOCKET_PATH_MAX} bytes at most)",
                resolution="set LABKERNEL_RUNTIME_DIR to a shorter path",
            )


def file_system_type(path: Path) -> int:
    """Magic number of the file system `path` lies on (man 2 statfs, `f_type`)."""
    libc = ctypes.CDLL(None, use_errno=True)
    # struct statfs begins with f_type, a long word, on every architecture with glibc or musl but s390 (unsigned int).
    buffer = ctypes.create_string_buffer(512)
    if libc.statfs(os.fsencode(path), buffer) != 0:
        err = ctypes.get_errno()
        raise OSError(err, os.strerror(err), str(path))
    return ctypes.c_ulong.from_buffer(buffer).value & 0xFFFFFFFF


def find_shared_file_system(path: Path) -> str | None:
    """Name of the network (or FUSE) file system `path` lies on, None for a local one or an unknown one."""
    try:
        return _SHARED_FILE_SYSTEMS.get(file_system_type(path))
    except OSError:
        return None


def _private_directory(path: Path) -> None:
    """Make `path` 0700 and refuse one of another user: /tmp is writable by all, and the sockets give full control."""
    if not path.is_dir():
        if str(path).startswith("/tmp/labkernel-"):
            os.makedirs(path.parent, mode=0o700, exist_ok=True)
            _check_owner(path.parent)
        os.makedirs(path, mode=0o700, exist_ok=True)
    _check_owner(path)


def _check_owner(path: Path) -> None:
    found = os.stat(path)
    uid = os.geteuid()
    if found.st_uid != uid:
        raise StoreError(
            f"{path} belongs to user {found.st_uid}, not to you ({uid})",
            resolution="set LABKERNEL_ROOT and LABKERNEL_RUNTIME_DIR to directories of your own",
        )
    if stat.S_IMODE(found.st_mode) & 0o022:
        os.chmod(path, 0o700)
