"""docker's verbs over virtual machines: the commands for containers, over another collection.

A `VM` has a Container's methods, so each command here is the container's own, with other words in its help and a host
whose `engine.containers` are the machines.
"""

from __future__ import annotations

import copy
from typing import Any

import click

from . import container, run
from .grammar import CONTAINER, LabCommand, host_of

_WORDS = (
    ("CONTAINER", "VM"),
    ("container(s)", "virtual machines"),
    ("containers", "virtual machines"),
    ("container", "virtual machine"),
)


class VMName(click.ParamType[str]):
    """A virtual machine's name or id; completes to the machines there are."""

    name = "vm"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        # Completion must never be the place where an error shows.
        try:
            names = [found.name for found in host_of(ctx).engine.vms.list(all=True)]
        except Exception:
            return []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


VM = VMName()


class _Engine:
    """An engine whose containers are its virtual machines."""

    id_title = "VM ID"

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def containers(self) -> Any:
        return self._engine.vms

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _Host:
    """The host of the command line, with such an engine."""

    def __init__(self, host: Any) -> None:
        self._host = host

    @property
    def engine(self) -> Any:
        return _Engine(self._host.engine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def _over_vms(command: click.Command) -> LabCommand:
    """The command for containers as one for virtual machines."""
    assert isinstance(command, LabCommand)
    found = copy.copy(command)
    callback = command.callback
    assert callback is not None

    def invoke(*args: Any, **values: Any) -> Any:
        root = click.get_current_context().find_root()
        host = root.obj
        root.obj = _Host(host)
        try:
            return callback(*args, **values)
        finally:
            root.obj = host

    found.callback = invoke
    found.help, found.usage = _reworded(command.help), _reworded(command.usage) or ""
    found.params = [_parameter(param) for param in command.params]
    return found


def _parameter(param: click.Parameter) -> click.Parameter:
    found = copy.copy(param)
    if param.type is CONTAINER:
        found.type = VM
    if isinstance(found, click.Option):
        found.help = _reworded(found.help)
    return found


def _reworded(text: str | None) -> str | None:
    for word, ours in _WORDS:
        text = text.replace(word, ours) if text else text
    return text


ps = _over_vms(container.ps)
exec_ = _over_vms(run.exec_)
attach = _over_vms(run.attach)
logs = _over_vms(container.logs)
stop = _over_vms(container.stop)
kill = _over_vms(container.kill)
restart = _over_vms(container.restart)
pause = _over_vms(container.pause)
unpause = _over_vms(container.unpause)
wait = _over_vms(container.wait)
rm = _over_vms(container.rm)
rename = _over_vms(container.rename)
port = _over_vms(container.port)
stats = _over_vms(container.stats)
