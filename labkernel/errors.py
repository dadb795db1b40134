"""Every exception labkernel raises on purpose, drawn as one tree.

    LabkernelError
    ├── UsageError                  a command line or argument that cannot be meant
    ├── NotFoundError               NoSuchContainer NoSuchImage NoSuchNetwork NoSuchVolume NoSuchVM
    ├── ConflictError               a name in use, a container in the wrong state
    ├── DriverError                 this machine does not allow what was asked for
    ├── RuntimeFailure              the supervisor could not do it
    │   ├── StartError              the command could not be started (125, 126 or 127)
    │   └── TaskError               a file system task failed in the worker
    ├── DockerfileError             carries the lines of the Dockerfile
    │   └── BuildError              a step failed; carries the exit status of its RUN
    ├── StoreError                  CorruptBlob DiskFull
    ├── ImageError                  InvalidReference LayerError ManifestError
    ├── RegistryError               a registry said no, or nothing
    ├── VMError                     no kernel, no QEMU, no answer from the guest
    └── ContainerExit               a command ended with a status other than 0 (only where asked to raise)

Each error has four parts, after craft-cli: *brief* (one line), *details*, *resolution* (what to do) and *link*; and
*exit_code*, which is what the terminal command ends with (Docker's: 125 the engine failed, 126 not executable, 127 not
found). Errors cross process borders as plain dictionaries (`to_dict`, `from_dict`), so a failure in the supervisor
reaches the notebook as the class it was.
"""

from __future__ import annotations

import errno
import os
from typing import Any, ClassVar


class LabkernelError(Exception):
    """Base of all errors a user can meet. In a notebook it shows as brief and hint, without a traceback."""

    exit_code: int = 1
    resolution: str | None = None
    link: str | None = None

    _registry: ClassVar[dict[str, type[LabkernelError]]] = {}

    def __init__(
        self,
        brief: str,
        *,
        details: str | None = None,
        resolution: str | None = None,
        link: str | None = None,
        exit_code: int | None = None,
    ) -> None:
        super().__init__(brief)
        self.brief = brief
        self.details = details
        if resolution is not None:
            self.resolution = resolution
        if link is not None:
            self.link = link
        if exit_code is not None:
            self.exit_code = exit_code

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        LabkernelError._registry[cls.__name__] = cls

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; attributes a subclass added (line numbers, names) travel under `facts`."""
        facts = {
            name: value
            for name, value in vars(self).items()
            if name not in {"brief", "details", "resolution", "link", "exit_code"} and not name.startswith("_")
        }
        return {
            "error": type(self).__name__,
            "brief": self.brief,
            "details": self.details,
            "resolution": self.resolution,
            "link": self.link,
            "exit_code": self.exit_code,
            "facts": facts,
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> LabkernelError:
        """The error another process described with `to_dict`; an unknown class becomes the base class."""
        cls = LabkernelError._registry.get(str(data.get("error")), LabkernelError)
        err = cls.__new__(cls)
        LabkernelError.__init__(
            err,
            str(data.get("brief", "")),
            details=data.get("details"),
            resolution=data.get("resolution"),
            link=data.get("link"),
            exit_code=data.get("exit_code"),
        )
        vars(err).update(data.get("facts") or {})
        return err

    def render(self) -> list[str]:
        """The lines a person reads: brief, details, hint, link."""
        lines = [self.brief]
        if self.details:
            lines += self.details.rstrip().splitlines()
        if self.resolution:
            lines.append(f"hint: {self.resolution}")
        if self.link:
            lines.append(f"see: {self.link}")
        return lines

    def _render_traceback_(self) -> list[str]:
        # IPython asks any exception for this before it formats a traceback (interactiveshell.showtraceback).
        first, *rest = self.render()
        return [f"\x1b[31m{type(self).__name__}\x1b[0m: {first}", *rest]


class UsageError(LabkernelError):
    """The words of a command or the arguments of a call do not fit."""

    exit_code = 125


class InvalidFilter(UsageError):
    """A filter that is not known, or a value it does not take: docker's daemon says so, hence 1 and not 125."""

    exit_code = 1


class NotFoundError(LabkernelError):
    """Something was named that is not there."""

    kind: ClassVar[str] = "object"
    listing: ClassVar[str] = ""

    def __init__(self, name: str, *, resolution: str | None = None) -> None:
        hint = resolution or (f"`{self.listing}` lists what there is" if self.listing else None)
        super().__init__(f"No such {self.kind}: {name}", resolution=hint)
        self.name = name


class NoSuchContainer(NotFoundError):
    kind = "container"
    listing = "container ps -a"


class NoSuchImage(NotFoundError):
    kind = "image"
    listing = "container images"
    exit_code = 125


class NoSuchNetwork(NotFoundError):
    kind = "network"
    listing = "network ls"

    def __init__(self, name: str, *, resolution: str | None = None) -> None:
        super().__init__(name, resolution=resolution)
        self.brief = f"network {name} not found"  # docker's words, which its clients look for
        self.args = (self.brief,)


class NoSuchVolume(NotFoundError):
    kind = "volume"
    listing = "volume ls"


class NoSuchVM(NotFoundError):
    kind = "VM"
    listing = "vm ps -a"


class ConflictError(LabkernelError):
    """A name is taken, or an object is in a state that does not allow the verb."""


class DriverError(LabkernelError):
    """This machine does not allow what was asked for; the resolution says what would."""

    exit_code = 125


class RuntimeFailure(LabkernelError):
    """Keeper, supervisor or worker could not do what was asked."""

    exit_code = 125


FOREIGN = "a program for linux/"
"""In what a failed start says of a program of another architecture."""
FOREIGN_HINT = (
    "as root, `apt install qemu-user-static binfmt-support` registers interpreters for other architectures with the "
    "kernel; in a pod that is done on its machine"
)

_FOREIGN_PROOT_HINT = (
    "`apt install qemu-user-static` (in binder/apt.txt: qemu-user-static), then make the container anew, of an image "
    "for that platform"
)


_UNMAPPED_HINT = (
    "with one id a container has root, or the one user that it was started as: use that, or get id ranges "
    "(`apt install uidmap`, `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER`)"
)


def foreign_hint(text: str) -> str | None:
    """What helps where a start failed with `text`; None where that is of no program of another architecture."""
    if FOREIGN not in text:
        return None
    return _FOREIGN_PROOT_HINT if "driver proot" in text else FOREIGN_HINT


class StartError(RuntimeFailure):
    """The container's command could not be started: exit_code 125 (set-up), 126 (not executable), 127 (not found)."""

    _HINTS: ClassVar[dict[int, str]] = {
        126: "is it a directory, or a script without its executable bit? `RUN chmod +x FILE` sets it",
        127: "the image has no such command; `run --rm IMAGE ls /bin` shows what it has",
    }

    def __init__(self, brief: str, **parts: Any) -> None:
        super().__init__(brief, **parts)
        if self.resolution is None:
            unmapped = _UNMAPPED_HINT if "is not mapped in this user namespace" in brief else None
            self.resolution = unmapped or foreign_hint(brief) or self._HINTS.get(self.exit_code)


def file_of(err: OSError) -> str:
    """The file an error names; "" for none, and where it is only the number of a descriptor."""
    return os.fsdecode(err.filename) if isinstance(err.filename, str | bytes) else ""


class TaskError(RuntimeFailure):
    """A file system task failed in the worker."""

    @classmethod
    def from_oserror(cls, act: str, err: OSError) -> LabkernelError:
        """`act` failed with `err`; a full disk becomes `DiskFull`."""
        if err.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(f"{act}: no space left on device", resolution=DISK_FULL_HINT)
        where = f": {file_of(err)}" if file_of(err) else ""
        return cls(f"{act}{where}: {err.strerror or err}")


class DockerfileError(LabkernelError):
    """The Dockerfile is wrong; `line` and `end_line` are 1-based and inclusive."""

    def __init__(self, brief: str, *, line: int | None = None, end_line: int | None = None, **parts: Any) -> None:
        super().__init__(brief, **parts)
        self.line = line
        self.end_line = end_line or line


class BuildError(DockerfileError):
    """A build step failed. `status` is the exit status of its RUN command, where it has one."""

    def __init__(self, brief: str, *, status: int | None = None, **parts: Any) -> None:
        super().__init__(brief, **parts)
        self.status = status


DISK_FULL_HINT = (
    "free some space (`labkernel system df`, `labkernel image prune`) or set LABKERNEL_ROOT to another disk"
)


class StoreError(LabkernelError):
    """The store under LABKERNEL_ROOT is not usable or not as it should be."""

    exit_code = 125


class CorruptBlob(StoreError):
    """A blob's bytes are not those of its digest."""


class DiskFull(StoreError):
    """The disk under the store is full (ENOSPC, EDQUOT)."""


class ImageError(LabkernelError):
    """An image is not what it claims to be."""

    exit_code = 125


class InvalidReference(ImageError):
    """Not an image reference (distribution-spec, *name* and *reference*)."""


class LayerError(ImageError):
    """A layer holds what no layer may hold."""


class ManifestError(ImageError):
    """A manifest, index or config that cannot be used."""


class RegistryError(LabkernelError):
    """A registry refused, or did not answer."""

    exit_code = 125


class VMError(LabkernelError):
    """The virtual machine could not do what was asked."""

    exit_code = 125


class ContainerExit(LabkernelError):
    """A command ended with a status other than 0, and the caller asked for that to raise.

    Has the attributes of the Docker SDK's ContainerError: `exit_status`, `container`, `command`, `image`, `stderr`.
    """

    def __init__(
        self,
        brief: str,
        *,
        status: int,
        container: str | None = None,
        command: list[str] | None = None,
        image: str | None = None,
        stderr: str | None = None,
        **parts: Any,
    ) -> None:
        super().__init__(brief, **parts)
        self.status = self.exit_status = self.exit_code = status
        self.container = container
        self.command = command
        self.image = image
        self.stderr = stderr
