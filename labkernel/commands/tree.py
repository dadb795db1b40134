"""The tree of commands: names, where each is implemented, and in which part of the help it stands."""

from __future__ import annotations

from typing import Any

import click

from .grammar import Entry, LabGroup

_COMMON, _MANAGEMENT, _LAB, _REST = "Common Commands", "Management Commands", "Lab Commands", "Commands"

ENTRIES = {
    "run": Entry("run:run", "Create and run a new container from an image", _COMMON),
    "exec": Entry("run:exec_", "Execute a command in a running container", _COMMON),
    "ps": Entry("container:ps", "List containers", _COMMON),
    "build": Entry("build:build", "Build an image from a Dockerfile", _COMMON),
    "pull": Entry("transfers:pull", "Download an image from a registry", _COMMON),
    "push": Entry("transfers:push", "Upload an image to a registry", _COMMON),
    "images": Entry("image:images", "List images", _COMMON),
    "login": Entry("transfers:login", "Authenticate to a registry", _COMMON),
    "logout": Entry("transfers:logout", "Log out from a registry", _COMMON),
    "version": Entry("system:version", "Show the version information", _COMMON),
    "info": Entry("system:info", "Display system-wide information", _COMMON),
    "compare": Entry("compare:compare", "Containers and virtual machines side by side, measured", _LAB),
    "doctor": Entry("system:doctor", "Try each capability of this machine", _LAB),
    "dockerfile": Entry("dockerfile:dockerfile", "The Dockerfile language on its own: JSON in and out", _LAB),
    "metrics": Entry("metrics:metrics", "Figures of what runs: table, CSV, JSON, Prometheus", _LAB),
    "kernelspec": Entry("kernelspec:kernelspec", "The Container Lab kernel for Jupyter", _LAB),
    "builder": Entry("build:builder", "Manage builds", _MANAGEMENT),
    "compose": Entry("compose:compose", "Services of a Compose file, up and down together", _MANAGEMENT),
    "container": Entry("groups:container", "Manage containers", _MANAGEMENT),
    "context": Entry("context:context", "Which engine commands are for: the embedded one, or a daemon", _MANAGEMENT),
    "daemon": Entry("daemon:daemon", "Serve the Docker Engine API to docker's client and SDKs", _MANAGEMENT),
    "image": Entry("groups:image", "Manage images", _MANAGEMENT),
    "network": Entry("network:network", "Manage networks", _MANAGEMENT),
    "registry": Entry("registry:registry", "The private registry", _MANAGEMENT),
    "system": Entry("system:system", "Manage the store and look at the machine", _MANAGEMENT),
    "vm": Entry("vm:vm", "Images as virtual machines", _MANAGEMENT),
    "volume": Entry("volume:volume", "Manage volumes", _MANAGEMENT),
    "attach": Entry("run:attach", "Attach to a running container", _REST),
    "commit": Entry("container:commit", "Create a new image from a container's changes", _REST),
    "cp": Entry("container:cp", "Copy files/folders between a container and the local filesystem", _REST),
    "create": Entry("run:create", "Create a new container", _REST),
    "debug": Entry("debug:debug", "Look around where the last build failed", _LAB),
    "diff": Entry("container:diff", "Inspect changes on a container's filesystem", _REST),
    "events": Entry("system:events", "Get events of the store", _REST),
    "export": Entry("container:export", "Export a container's filesystem as a tar archive", _REST),
    "history": Entry("image:history", "Show the history of an image", _REST),
    "import": Entry("image:import_", "Import a tarball as an image", _REST),
    "inspect": Entry("system:inspect", "Return low-level information on Docker objects", _REST),
    "kill": Entry("container:kill", "Kill one or more running containers", _REST),
    "load": Entry("image:load", "Load an image from a tar archive or STDIN", _REST),
    "logs": Entry("container:logs", "Fetch the logs of a container", _REST),
    "pause": Entry("container:pause", "Pause all processes within one or more containers", _REST),
    "port": Entry("container:port", "List port mappings", _REST),
    "rename": Entry("container:rename", "Rename a container", _REST),
    "restart": Entry("container:restart", "Restart one or more containers", _REST),
    "rm": Entry("container:rm", "Remove one or more containers", _REST),
    "rmi": Entry("image:rmi", "Remove one or more images", _REST),
    "save": Entry("image:save", "Save one or more images to a tar archive", _REST),
    "search": Entry("transfers:search", "Search Docker Hub, or another registry, for images", _REST),
    "start": Entry("run:start", "Start one or more stopped containers", _REST),
    "stats": Entry("container:stats", "Display container resource usage statistics", _REST),
    "stop": Entry("container:stop", "Stop one or more running containers", _REST),
    "tag": Entry("image:tag", "Create a tag TARGET_IMAGE that refers to SOURCE_IMAGE", _REST),
    "top": Entry("container:top", "Display the running processes of a container", _REST),
    "update": Entry("container:update", "Update configuration of one or more containers", _REST),
    "unpause": Entry("container:unpause", "Unpause all processes within one or more containers", _REST),
    "wait": Entry("container:wait", "Block until containers stop, then print their exit codes", _REST),
}

_REGISTRY = "leave it out: `pull`, `push` and `image inspect` are there"
ABSENT = {
    "manifest": _REGISTRY,
    **dict.fromkeys(("swarm", "service", "stack", "node", "secret", "config"), "`compose` runs services here"),
    **dict.fromkeys(("plugin", "trust", "checkpoint", "buildx"), "leave it out"),
}


def _version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if value:
        from .. import __version__
        from .grammar import host_of

        host_of(ctx).line(f"labkernel version {__version__}")
        ctx.exit()


ROOT = LabGroup(
    "labkernel",
    help="A container lab that lives in Jupyter. The commands are docker's.",
    epilog="Run 'labkernel COMMAND --help' for more information on a command.",
    entries=ENTRIES,
    absent=ABSENT,
    params=[
        click.Option(
            ["-v", "--version"],
            is_flag=True,
            expose_value=False,
            is_eager=True,
            callback=_version,
            help="Print version information and quit",
        )
    ],
)
# `%container ls` and `%container ps` mean the same: a magic takes the words of its group and of the top level.
CONTAINER_ROOT = LabGroup(
    "container",
    help="Containers and images: docker's commands, in a cell. A command's own help: %container run --help",
    entries={
        **ENTRIES,
        "ls": Entry("container:ps", "", ""),
        "list": Entry("container:ps", "", ""),
        "remove": Entry("container:rm", "", ""),
        "prune": Entry("container:prune", "Remove all stopped containers", _REST),
        "inspect": ENTRIES["inspect"],
    },
    absent=ABSENT,
)
LAB_ROOT = LabGroup(
    "lab",
    help="The lab itself: `%lab doctor`, `%lab info`, `%lab check`; and every other command.",
    entries={
        "doctor": ENTRIES["doctor"],
        "info": ENTRIES["info"],
        "check": Entry("system:check", "Look for what is inconsistent or leaked", _LAB),
        "df": Entry("system:df", "Show disk usage", _LAB),
        **ENTRIES,
    },
    absent=ABSENT,
)
