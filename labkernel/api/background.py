"""A daemon in the background: start it, find it, end it; and systemd's units for one that starts by itself.

What runs is recorded in the runtime directory by the daemon itself, however it was started, and believed only as long
as that very process lives.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import LabkernelError, NotFoundError
from ..store import servers

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..store.layout import Layout

START_TIMEOUT_S = 60.0
RECORD = "daemon.json"


class NoDaemon(NotFoundError):
    """No daemon of this store runs."""

    def __init__(self) -> None:
        LabkernelError.__init__(self, "no daemon runs for this store", resolution="`daemon start` starts one")


@dataclass(frozen=True)
class RunningDaemon:
    """A daemon of this store. `address` is what DOCKER_HOST takes."""

    pid: int
    addresses: tuple[str, ...]

    @property
    def address(self) -> str:
        return self.addresses[0]

    def __repr__(self) -> str:
        return f"<Daemon on {', '.join(self.addresses)}: process {self.pid}>"


def default_address(layout: Layout) -> str:
    """The socket of a store's daemon when none is given: in the user's runtime directory."""
    return f"unix://{layout.runtime_dir}/docker.sock"


@contextmanager
def recorded(layout: Layout, addresses: Sequence[str]) -> Iterator[None]:
    """While this process serves, it is found by `find`."""
    path = layout.runtime_dir / RECORD
    temporary = layout.runtime_dir / f"{RECORD}.{os.getpid()}"
    facts = {"pid": os.getpid(), "start": servers.start_ticks(os.getpid()), "addresses": list(addresses)}
    temporary.write_text(json.dumps(facts))
    os.rename(temporary, path)
    try:
        yield
    finally:
        if (_read(path) or {}).get("pid") == os.getpid():
            path.unlink(missing_ok=True)


def find(layout: Layout) -> RunningDaemon | None:
    """The daemon of the store, the last started when there are several; None when none runs."""
    record = _read(layout.runtime_dir / RECORD)
    if record is None or servers.start_ticks(record["pid"]) != record["start"]:
        return None
    return RunningDaemon(record["pid"], tuple(record["addresses"]))


def start(layout: Layout, driver: str, words: Sequence[str] = ()) -> RunningDaemon:
    """Start a daemon that outlives this process, with the words of `labkernel daemon`; the one that runs, when one
    does. Returns when it answers. Raises LabkernelError when it does not start."""
    running = find(layout)
    if running is not None:
        return running
    return servers.start(
        layout,
        ["daemon", *words],
        log="daemon.log",
        find=lambda pid: found if (found := find(layout)) is not None and found.pid == pid else None,
        failure=lambda said: LabkernelError("the daemon did not start", details=said),
        timeout_s=START_TIMEOUT_S,
        env={"LABKERNEL_DRIVER": driver},
    )


def stop(layout: Layout) -> RunningDaemon:
    """End the daemon; returns when it has gone. Containers go on. Raises NoDaemon."""
    running = find(layout)
    if running is None:
        raise NoDaemon
    try:
        servers.end(running.pid)
    except ProcessLookupError:
        raise NoDaemon from None
    return running


def unit(kind: str, layout: Layout) -> str:
    """The text of systemd's user unit `labkernel.service` or `labkernel.socket` for this Python and this store."""
    command = f"{_unit_word(sys.executable).replace('$', '$$')} -m labkernel.cli daemon"
    variables = {"LABKERNEL_ROOT": layout.root, "LABKERNEL_RUNTIME_DIR": layout.runtime_dir}
    environment = "".join(f"Environment={_unit_word(f'{name}={value}')}\n" for name, value in variables.items())
    if kind == "socket":
        path = default_address(layout).removeprefix("unix://")
        return (
            "[Unit]\nDescription=Socket of the labkernel daemon (Docker Engine API)\n\n"
            f"[Socket]\nListenStream={path.replace('%', '%%')}\nSocketMode=0600\n"
            "RemoveOnStop=yes\n\n[Install]\nWantedBy=sockets.target\n"
        )
    return (
        "[Unit]\nDescription=labkernel daemon (Docker Engine API)\n\n"
        # Containers belong to the supervisor: KillMode=process leaves them alone when the daemon is restarted.
        f"[Service]\nType=simple\nExecStart={command} -H fd://\n{environment}KillMode=process\nDelegate=yes\n"
        "Restart=on-failure\n\n[Install]\nWantedBy=default.target\n"
    )


def _unit_word(text: str) -> str:
    """One word of a unit's setting, with blanks in it or not. Source: man 7 systemd.syntax, "Quoting"."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return plain if re.fullmatch(r"[\w./=@:+%-]+", plain) else f'"{plain}"'


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text())
        return {"pid": int(found["pid"]), "start": found["start"], "addresses": list(found["addresses"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
