"""What a graded cell may ask: checks as data, so that another process can evaluate them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import UsageError


@dataclass(frozen=True)
class Check:
    """One question about the state of an engine, and what a right answer is worth.

    `kind` names the evaluator in `evaluate.py`; `subject` is an image or container name; `facts` are its arguments.
    """

    kind: str
    subject: str
    title: str
    points: float
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.points < 0:
            raise UsageError(f"points of a check cannot be negative: {self.points}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class ImageChecks:
    """Questions about an image."""

    name: str

    def exists(self, *, points: float = 1) -> Check:
        return Check("image_exists", self.name, f"the image {self.name} exists", points)

    def env(self, variable: str, value: str | None = None, *, points: float = 1) -> Check:
        """`variable` is set in the image's config, to `value` where one is given."""
        wanted = f"{variable}={value}" if value is not None else variable
        facts = {"variable": variable, "value": value}
        return Check("image_env", self.name, f"{self.name} sets {wanted}", points, facts)

    def workdir(self, path: str, *, points: float = 1) -> Check:
        return Check("image_workdir", self.name, f"{self.name} works in {path}", points, {"path": path})

    def layers(self, at_least: int, *, points: float = 1) -> Check:
        """The image has at least that many layers."""
        title = f"{self.name} has {at_least} layers or more"
        return Check("image_layers", self.name, title, points, {"at_least": at_least})

    def prints(self, text: str, *, command: list[str] | None = None, status: int = 0, points: float = 1) -> Check:
        """A new container, running `command` (default: the image's own), prints `text` and ends with `status`."""
        facts = {"text": text, "command": command, "status": status}
        return Check("image_prints", self.name, f"{self.name} prints “{text}”", points, facts)


@dataclass(frozen=True)
class ContainerChecks:
    """Questions about a container."""

    name: str

    def exists(self, *, points: float = 1) -> Check:
        return Check("container_exists", self.name, f"the container {self.name} exists", points)

    def made_of(self, image_name: str, *, points: float = 1) -> Check:
        """The container runs the image that `image_name` means now."""
        title = f"{self.name} was made of {image_name}"
        return Check("container_image", self.name, title, points, {"image": image_name})

    def exited(self, status: int = 0, *, points: float = 1) -> Check:
        return Check("container_exited", self.name, f"{self.name} ended with {status}", points, {"status": status})

    def running(self, *, points: float = 1) -> Check:
        return Check("container_running", self.name, f"{self.name} runs", points)

    def limited(self, *, memory: str | int | None = None, cpus: float | None = None, points: float = 1) -> Check:
        """The container has exactly this memory limit (`"64m"` or bytes) and this share of CPUs, where given."""
        wanted = ", ".join(
            [
                *([f"memory {memory}"] if memory is not None else []),
                *([f"{cpus:g} CPU{'' if cpus == 1 else 's'}"] if cpus else []),
            ]
        )
        facts = {"memory": memory, "cpus": cpus}
        return Check("container_limited", self.name, f"{self.name} is limited to {wanted}", points, facts)

    def logged(self, text: str, *, points: float = 1) -> Check:
        return Check("container_logged", self.name, f"{self.name} logged “{text}”", points, {"text": text})


def image(name: str) -> ImageChecks:
    """Checks about the image `name`."""
    return ImageChecks(name)


def container(name: str) -> ContainerChecks:
    """Checks about the container `name`."""
    return ContainerChecks(name)
