"""docker's management groups: the same commands as at the top level, under their noun."""

from __future__ import annotations

from typing import Any

import click

from .container import NAMES
from .grammar import CONTAINER, IMAGE, Entry, LabGroup, command, host_of, option, words

_CONTAINER = {
    "attach": Entry("run:attach", "Attach to a running container"),
    "commit": Entry("container:commit", "Create a new image from a container's changes"),
    "cp": Entry("container:cp", "Copy files/folders between a container and the local filesystem"),
    "create": Entry("run:create", "Create a new container"),
    "diff": Entry("container:diff", "Inspect changes on a container's filesystem"),
    "exec": Entry("run:exec_", "Execute a command in a running container"),
    "explain": Entry("explain:explain", "Show each step the sandbox takes for a run line"),
    "export": Entry("container:export", "Export a container's filesystem as a tar archive"),
    "inspect": Entry("groups:inspect_container", "Display detailed information on one or more containers"),
    "kill": Entry("container:kill", "Kill one or more running containers"),
    "logs": Entry("container:logs", "Fetch the logs of a container"),
    "ls": Entry("container:ps", "List containers"),
    "list": Entry("container:ps", "", ""),
    "ps": Entry("container:ps", "", ""),
    "pause": Entry("container:pause", "Pause all processes within one or more containers"),
    "port": Entry("container:port", "List port mappings"),
    "prune": Entry("container:prune", "Remove all stopped containers"),
    "rename": Entry("container:rename", "Rename a container"),
    "restart": Entry("container:restart", "Restart one or more containers"),
    "rm": Entry("container:rm", "Remove one or more containers"),
    "remove": Entry("container:rm", "", ""),
    "run": Entry("run:run", "Create and run a new container from an image"),
    "start": Entry("run:start", "Start one or more stopped containers"),
    "stats": Entry("container:stats", "Display container resource usage statistics"),
    "stop": Entry("container:stop", "Stop one or more running containers"),
    "top": Entry("container:top", "Display the running processes of a container"),
    "update": Entry("container:update", "Update configuration of one or more containers"),
    "unpause": Entry("container:unpause", "Unpause all processes within one or more containers"),
    "wait": Entry("container:wait", "Block until containers stop, then print their exit codes"),
}
_IMAGE = {
    "attach": Entry("artifacts:attach", "Attach files to an image in its registry"),
    "build": Entry("build:build", "Build an image from a Dockerfile"),
    "diff": Entry("layers:diff", "Compare the file systems of two images"),
    "export": Entry("image:export", "Write the flattened root file system as a tar archive"),
    "fetch": Entry("artifacts:fetch", "Save the files of an artifact"),
    "history": Entry("image:history", "Show the history of an image"),
    "import": Entry("image:import_", "Import a tarball as an image"),
    "inspect": Entry("groups:inspect_image", "Display detailed information on one or more images"),
    "layers": Entry("layers:tree", "", ""),
    "load": Entry("image:load", "Load an image from a tar archive or STDIN"),
    "ls": Entry("image:images", "List images"),
    "list": Entry("image:images", "", ""),
    "prune": Entry("image:prune", "Remove unused images"),
    "pull": Entry("transfers:pull", "Download an image from a registry"),
    "push": Entry("transfers:push", "Upload an image to a registry"),
    "referrers": Entry("artifacts:referrers", "List what is attached to an image in its registry"),
    "rm": Entry("image:rmi", "Remove one or more images"),
    "remove": Entry("image:rmi", "", ""),
    "save": Entry("image:save", "Save one or more images to a tar archive"),
    "tag": Entry("image:tag", "Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE"),
    "verify": Entry("image:verify", "Read every blob again and compare it with its digest"),
    "tree": Entry("layers:tree", "What each layer added, changed, removed, and bytes wasted"),
}
container = LabGroup("container", help="Manage containers.", entries=_CONTAINER)
image = LabGroup("image", help="Manage images.", entries=_IMAGE)


@command("inspect", NAMES)
@option("-f", "--format", "form", metavar="string", help="json or a Go template")
@words("names", least=1, kind=CONTAINER)
@click.pass_context
def inspect_container(ctx: click.Context, names: tuple[str, ...], form: str | None) -> Any:
    """Display detailed information on one or more containers."""
    from .system import inspected

    return inspected(host_of(ctx), names, form, "container")


@command("inspect", "[OPTIONS] IMAGE [IMAGE...]")
@option("-f", "--format", "form", metavar="string", help="json or a Go template")
@words("names", least=1, kind=IMAGE)
@click.pass_context
def inspect_image(ctx: click.Context, names: tuple[str, ...], form: str | None) -> Any:
    """Display detailed information on one or more images."""
    from .system import inspected

    return inspected(host_of(ctx), names, form, "image")
