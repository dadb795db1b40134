"""One container: the object that services, magics and the command line hand around.

Its identity and settings come from the database row, its status from the state file that the supervisor keeps, its
verbs go to the supervisor. Names and arguments are the Docker SDK's; units as there (seconds, bytes).
Source: Docker SDK for Python, `Container`; Docker Engine API, ContainerInspect.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..display import command_words, human_age, status_words, table_html, table_text, without_formulas
from ..errors import ConflictError, NoSuchContainer, NoSuchImage, UsageError
from ..linux.files import read_file
from ..runtime.settings import check_name, parse_command, parse_signal

if TYPE_CHECKING:
    import sqlite3
    from pathlib import Path

    from ..containers import Containers
    from ..imaging.image import Image
    from ..runtime.client import Attachment
    from .files import TaskOutput

Output = bytes | tuple[bytes | None, bytes | None]


class ExecResult(NamedTuple):
    """What a command in a container gave: `exit_code` is None while it runs (detach, stream)."""

    exit_code: int | None
    output: Any


class Container:
    """A container of this store. Cheap to make; reads what changes when it is asked."""

    def __init__(
        self, containers: Containers, id: str, name: str, image_id: str, image_ref: str, created_at: float, record: Any
    ) -> None:
        self._containers = containers
        self.id = id
        self.name = name
        self.image_id = image_id
        self.image_ref = image_ref
        self.created_at = created_at
        self._record: dict[str, Any] | str = record
        self.seen: dict[str, Any] | None = None
        """Its state when the listing that it is of looked at it."""

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def short_id(self) -> str:
        return self.id[:12]

    @property
    def record(self) -> dict[str, Any]:
        """What the database keeps of it: command, settings, mounts, warnings. Shared: copy before changing it."""
        if isinstance(self._record, str):
            self._record = json.loads(self._record)
        return self._record  # type: ignore[return-value]

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.record["settings"]
        return found

    @property
    def command(self) -> list[str]:
        """The command as given; empty when the image's own is used."""
        return list(self.record.get("command") or [])

    @property
    def labels(self) -> dict[str, str]:
        return dict(self.record.get("labels") or {})

    @property
    def warnings(self) -> list[str]:
        """What of its settings does not hold on this machine or in this release."""
        return list(self.record.get("warnings") or [])

    @property
    def image(self) -> Image:
        """Raises NoSuchImage when it was removed by force."""
        return self._containers.images.get(self.image_id)

    @property
    def directory(self) -> Path:
        return self._containers.layout.container_dir(self.id)

    def rewire(self, _wires: Mapping[str, Any]) -> list[str]:
        """Tell what is inside which networks it is in now, where the supervisor cannot; returns warnings."""
        return []

    def check_networks(self, more: int) -> None:
        """That it can be in `more` networks than it is in. Raises ConflictError."""

    def connected(self, tx: sqlite3.Connection, network: str) -> None:
        """In the transaction that puts it into `network`."""

    @property
    def log_path(self) -> Path:
        return self.directory / "log.json"

    def runtime_state(self) -> dict[str, Any]:
        """The state the supervisor keeps (contract: state.json); `{"status": "created"}` before the first start.

        Raises NoSuchContainer when the container is gone."""
        return self._containers.state(self.id)

    @property
    def status(self) -> str:
        """created, running, paused, restarting, exited, dead; `removed` when it is gone."""
        try:
            return str(self.runtime_state()["status"])
        except NoSuchContainer:
            return "removed"

    @property
    def pid(self) -> int | None:
        """Process id of its first process on this machine, None when it does not run."""
        state = self.runtime_state()
        return int(state["pid"]) if state["status"] in ("running", "paused") and state.get("pid") else None

    @property
    def ports(self) -> dict[str, Any]:
        """Where its ports are reached: {"80/tcp": [{"HostIp", "HostPort"}] or None}; empty while it does not run."""
        from ..networking.settings import ports

        return ports(self, self.runtime_state())

    def port_lines(self, port: str | None = None) -> list[str]:
        """As `docker port` prints them; of one `port` (`80/tcp`) only, when given."""
        from ..networking.settings import port_lines

        return port_lines(self.ports, port)

    @property
    def health(self) -> str:
        return str((self.runtime_state().get("health") or {}).get("Status") or "unknown")

    @property
    def attrs(self) -> dict[str, Any]:
        """As `docker inspect` shows it."""
        from .inspection import inspect_container

        return inspect_container(self)

    @property
    def summary(self) -> dict[str, Any]:
        """What a listing needs of `attrs`, without its image and its configuration."""
        from .inspection import summarize_container

        return summarize_container(self)

    def reload(self) -> None:
        """Read name and settings anew. Raises NoSuchContainer."""
        fresh = self._containers.get(self.id)
        self.name, self._record = fresh.name, fresh._record

    # -- verbs ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it; without effect when it runs. Raises StartError (exit_code 125, 126, 127)."""
        status = self.runtime_state()["status"]
        if status == "paused":
            raise ConflictError("cannot start a paused container, try unpause instead")
        if status != "running":
            known = self.record.setdefault("warnings", [])
            known += [line for line in self._containers.start(self.id) if line not in known]

    def stop(self, *, timeout: float | None = None, signal: str | int | None = None) -> None:
        """Ask it to end (its stop signal), after `timeout` seconds kill it. Without effect when it does not run."""
        if self.runtime_state()["status"] in ("running", "paused", "restarting"):
            number = parse_signal(signal) if signal is not None else None
            self._containers.runtime.stop(self.id, timeout_s=timeout, signal=number)

    def kill(self, signal: str | int | None = None) -> None:
        """Send a signal (default SIGKILL) to its first process. Raises ConflictError when it does not run."""
        number = parse_signal(signal if signal is not None else "KILL")
        status = self.runtime_state()["status"]
        if status not in ("running", "paused"):
            raise ConflictError(
                f"cannot kill container: {self.name}: container {self.id} is not running",
                resolution=f"it is {status}; `container start {self.name}` starts it",
            )
        self._containers.runtime.kill(self.id, number)

    def restart(self, *, timeout: float | None = None, signal: str | int | None = None) -> None:
        """Stop (with `signal`, as `stop`), then start. Raises StartError."""
        self.stop(timeout=timeout, signal=signal)
        self.start()
        self._containers.tell(self, "restart")

    def pause(self) -> None:
        """Freeze all its processes. Raises ConflictError when it does not run or is paused."""
        status = self.runtime_state()["status"]
        if status == "paused":
            raise ConflictError(f"container {self.id} is already paused")
        self._need_running(status)
        self._containers.runtime.pause(self.id)

    def unpause(self) -> None:
        """Let its processes run again. Raises ConflictError when it is not paused."""
        if self.runtime_state()["status"] != "paused":
            raise ConflictError(f"Container {self.id} is not paused")
        self._containers.runtime.unpause(self.id)

    def wait(self, *, timeout: float | None = None, condition: str = "not-running") -> dict[str, Any]:
        """Wait for its end: {"StatusCode": int, "Error": None or {"Message"}}. `condition` as docker has it.

        Interruptible; `timeout` (seconds) raises TimeoutError."""
        state = self.runtime_state()
        if condition == "not-running" and state["status"] in ("exited", "dead"):
            return {"StatusCode": int(state.get("exit_code") or 0), "Error": None}
        if timeout is not None:
            return self._wait_until(time.monotonic() + timeout, condition)
        status = self._containers.runtime.wait(self.id, condition)
        return {"StatusCode": status.exit_code, "Error": {"Message": status.error} if status.error else None}

    def _wait_until(self, deadline: float, condition: str) -> dict[str, Any]:
        import threading

        found: list[dict[str, Any]] = []
        waiter = threading.Thread(target=lambda: found.append(self.wait(condition=condition)), daemon=True)
        waiter.start()
        waiter.join(max(0.0, deadline - time.monotonic()))
        if not found:
            raise TimeoutError(f"container {self.name} did not end in time")
        return found[0]

    def remove(self, *, force: bool = False, v: bool = False, link: bool = False) -> None:
        """Remove it with its writable layer and log; `v` with its anonymous volumes, too; `force` kills it first.

        Raises ConflictError when it runs."""
        if link:
            raise UsageError("links between containers are not available in this release")
        self._containers.remove(self, force=force, volumes=v)

    def rename(self, name: str) -> None:
        """Raises ConflictError when the name is taken, UsageError when it is none."""
        self._containers.rename(self, check_name(name))

    def update(self, **limits: Any) -> dict[str, Any]:
        """Other limits (`mem_limit`, `nano_cpus`, `cpu_shares`, `pids_limit`, …) and `restart_policy`, at once when it
        runs: {"Warnings": [...]}.

        `volumes`, `mounts`, `tmpfs`, `ports` and `remove_mounts` (destinations) make it anew over its own files: one
        that runs is stopped and started. Raises UsageError, ConflictError, RuntimeFailure when the kernel refuses."""
        from .changing import update

        return update(self, limits)

    def resize(self, height: int, width: int) -> None:
        """Tell its terminal the new size in characters."""
        self._containers.runtime.resize(self.id, height, width)
        self._containers.tell(self, "resize", height=str(height), width=str(width))

    # -- output -----------------------------------------------------------------------------------------------------

    def logs(
        self,
        *,
        stdout: bool = True,
        stderr: bool = True,
        stream: bool = False,
        follow: bool | None = None,
        timestamps: bool = False,
        tail: int | str = "all",
        since: Any = None,
        until: Any = None,
    ) -> Any:
        """What it has written, as bytes, or as an iterator of bytes with `stream` (and then following by default).

        `tail` counts lines from the end; `since` and `until` are seconds since the epoch, datetimes or docker's
        durations such as `10m`."""
        chunks = (
            data
            for _, data in self.log_records(
                stdout=stdout,
                stderr=stderr,
                follow=stream if follow is None else follow,
                timestamps=timestamps,
                tail=tail,
                since=since,
                until=until,
            )
        )
        return chunks if stream else b"".join(chunks)

    def log_records(
        self,
        *,
        stdout: bool = True,
        stderr: bool = True,
        follow: bool = False,
        timestamps: bool = False,
        tail: int | str = "all",
        since: Any = None,
        until: Any = None,
        details: bool = False,
    ) -> Iterator[tuple[str, bytes]]:
        """The same as (stream, bytes), for who keeps the streams apart."""
        from ..runtime.logreader import LogQuery, read_log

        streams = {name for name, wanted in (("stdout", stdout), ("stderr", stderr)) if wanted}
        if not streams:
            raise UsageError("you must choose at least one stream")
        if (self.settings.get("log_config") or {}).get("type") == "none":
            raise UsageError("configured logging driver does not support reading", exit_code=1)
        query = LogQuery.parse(streams, tail=tail, since=since, until=until, timestamps=timestamps, details=details)
        self.runtime_state()  # NoSuchContainer now, not while reading
        running = (lambda: self.status in ("running", "paused", "restarting")) if follow else None
        return read_log(self.log_path, query, running=running)

    def attach(
        self,
        *,
        stdout: bool = True,
        stderr: bool = True,
        stream: bool = False,
        logs: bool = False,
        demux: bool = False,
    ) -> Any:
        """Its output from now on (with `logs` from the start), until it ends: bytes, or an iterator with `stream`.

        `demux` gives (stdout, stderr) pairs. For input and terminals: `open_attachment`."""
        attachment = self.open_attachment(stdout=stdout, stderr=stderr, logs=logs)
        return _collect(attachment, stream=stream, demux=demux)

    def open_attachment(
        self, *, stdin: bool = False, stdout: bool = True, stderr: bool = True, logs: bool = False
    ) -> Attachment:
        """The live connection: an iterable of (stream, bytes) that takes input. Raises ConflictError when stopped."""
        status = self.runtime_state()["status"]
        if status == "paused":
            raise ConflictError("You cannot attach to a paused container, unpause it first")
        if status not in ("running", "created"):
            raise ConflictError("You cannot attach to a stopped container, start it first")
        return self._containers.runtime.attach(self.id, stdin=stdin, stdout=stdout, stderr=stderr, logs=logs)

    def exec_run(
        self,
        cmd: str | Sequence[str],
        *,
        stdout: bool = True,
        stderr: bool = True,
        stdin: bool = False,
        tty: bool = False,
        privileged: bool = False,
        user: str = "",
        detach: bool = False,
        stream: bool = False,
        environment: Mapping[str, str | None] | Sequence[str] | None = None,
        workdir: str | None = None,
        demux: bool = False,
    ) -> ExecResult:
        """Run another command inside. Output is bytes; (stdout, stderr) with `demux`; an iterator with `stream`.

        Raises ConflictError when the container does not run, StartError when the command cannot be started."""
        attachment = self.open_exec(
            cmd,
            stdin=stdin,
            tty=tty,
            privileged=privileged,
            user=user,
            detach=detach,
            environment=environment,
            workdir=workdir,
            tied=not detach,
        )
        if detach:
            attachment.close()
            return ExecResult(None, b"")
        wanted = {name for name, on in (("stdout", stdout), ("stderr", stderr)) if on}
        if stream:
            return ExecResult(None, _collect(attachment, stream=True, demux=demux, wanted=wanted))
        output = _collect(attachment, stream=False, demux=demux, wanted=wanted)
        return ExecResult(attachment.exit_code, output)

    def open_exec(
        self,
        cmd: str | Sequence[str],
        *,
        stdin: bool = False,
        tty: bool = False,
        privileged: bool = False,
        user: str = "",
        detach: bool = False,
        environment: Mapping[str, str | None] | Sequence[str] | None = None,
        workdir: str | None = None,
        console_size: Sequence[int] | None = None,
        exec_id: str | None = None,
        tied: bool = False,
    ) -> Attachment:
        """Start a command inside and return the live connection to it. `console_size`: rows, columns; `exec_id`: what
        events call it; `tied`: it ends when this process dies without having closed the connection."""
        from ..runtime.settings import normalize

        args = parse_command(cmd)
        if not args:
            raise UsageError("No exec command specified")
        given = normalize({"environment": environment, "working_dir": workdir, "tty": tty})
        # What is not said here is as the container's own process has it; the supervisor knows.
        process: dict[str, Any] = {
            "args": args,
            "env": given.get("environment", []),
            "cwd": given.get("working_dir"),
            "user": user or None,
            "privileged": privileged,
        }
        if console_size:
            process["consoleSize"] = {"height": console_size[0], "width": console_size[1]}
        try:
            how = {"stdin": stdin, "tty": tty, "detach": detach, "tied": tied}
            return self._containers.runtime.exec(self.id, process, exec_id=exec_id, **how)
        except ConflictError:
            status = self.runtime_state()["status"]
            if status == "paused":
                raise ConflictError(f"Container {self.name} is paused, unpause the container before exec") from None
            self._need_running(status)
            raise

    # -- files ------------------------------------------------------------------------------------------------------

    def get_archive(
        self,
        path: str,
        chunk_size: int = 2 << 20,
        encode_stream: bool = False,  # noqa: FBT001, FBT002
    ) -> tuple[TaskOutput, dict[str, Any]]:
        """A tar of a file or directory as (chunks, {"name", "size", "mode", "mtime", "linkTarget"}); also of a stopped
        container. `mode` has Go's bits. Raises NoSuchFile."""
        from .files import get_archive

        return get_archive(self, path, chunk_size)

    def put_archive(self, path: str, data: Any) -> bool:
        """Unpack a tar (bytes, file or iterable of bytes) over the directory `path`. Raises NoSuchFile, UsageError."""
        from .files import put_archive

        return put_archive(self, path, data)

    def diff(self) -> list[dict[str, Any]]:
        """What it changed in its image: {"Path", "Kind"} with kind 0 changed, 1 added, 2 deleted."""
        from .files import diff

        return diff(self)

    def export(self, chunk_size: int = 2 << 20) -> TaskOutput:
        """Its whole file system as a tar, without what is in volumes."""
        from .files import export

        return export(self, chunk_size)

    def commit(
        self,
        repository: str | None = None,
        tag: str | None = None,
        *,
        message: str | None = None,
        author: str | None = None,
        pause: bool = True,
        changes: str | Sequence[str] | None = None,
        conf: Mapping[str, Any] | None = None,
    ) -> Image:
        """A new image of its image and what it changed. `changes` are Dockerfile instructions; while it is made the
        container is paused, unless `pause` is off."""
        from .files import commit

        return commit(self, repository, tag, message=message, author=author, pause=pause, changes=changes, conf=conf)

    @property
    def _folder(self) -> str:
        # `directory` by name, not by Path: each exec reads in it
        return f"{self._containers.layout.root}/containers/{self.id}"

    def config(self) -> dict[str, Any]:
        """Its runtime-spec configuration. Raises NoSuchContainer."""
        try:
            found: dict[str, Any] = json.loads(read_file(f"{self._folder}/config.json"))
        except FileNotFoundError:
            raise NoSuchContainer(self.name) from None
        return found

    # -- figures ----------------------------------------------------------------------------------------------------

    def stats(self, *, stream: bool = False, decode: bool | None = None) -> Any:
        """Docker's stats JSON: one reading over about a second, or an iterator of one each second with `stream`, which
        ends with the container. One that does not run has used nothing."""
        from ..metrics import stats_of_ended, stats_stream

        self.runtime_state()
        readings = stats_stream(self, id=self.id, name=self.name)
        if stream:
            return readings
        # the first has nothing to compare with, so its percentage would be that since the start
        reading = next(readings, None)
        return next(readings, reading) or stats_of_ended(id=self.id, name=self.name)

    def sizes(self) -> tuple[int, int]:
        """Bytes of what it has written, and of that with its image."""
        image = find_image(self)
        own = disk_bytes(self.directory / "upper")
        return own, own + (image.size_bytes if image else 0)

    def top(self, *, ps_args: str | None = None) -> dict[str, Any]:
        """Its processes: {"Titles": [...], "Processes": [[...]]}, as `ps -ef` words them, or this machine's `ps` with
        other arguments. Needs it to run."""
        from ..runtime.processes import process_table, ps_table

        state = self.runtime_state()
        self._need_running(state["status"])
        self._containers.tell(self, "top")
        titles, rows = process_table(state) if (ps_args or "-ef").strip() == "-ef" else ps_table(state, ps_args or "")
        return {"Titles": titles, "Processes": rows}

    def _need_running(self, status: str) -> None:
        if status not in ("running", "paused"):
            raise ConflictError(
                f"container {self.id} is not running", resolution=f"`container start {self.name}` starts it"
            )

    # -- display ----------------------------------------------------------------------------------------------------

    def status_line(self) -> str:
        """As `docker ps` words it: `Up 5 minutes`, `Exited (0) 2 hours ago`."""
        try:
            return status_words(self.runtime_state())
        except NoSuchContainer:
            return "Removed"

    def row(self) -> tuple[str, str, str, str, str, str]:
        return (
            self.short_id,
            self.image_ref,
            command_words(self.record.get("args") or self.command),
            human_age(self.created_at),
            self.status_line(),
            self.name,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Container) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"<Container {self.name} ({self.short_id}) {self.image_ref}: {self.status_line()}>"

    @without_formulas
    def _repr_html_(self) -> str:
        import html

        from .guarantees import as_html, guarantees

        notes = "".join(f"<div class='labkernel-warning'>{html.escape(line)}</div>" for line in self.warnings)
        try:
            held = as_html(guarantees(self), self._containers.driver_name)
        except NoSuchContainer:
            held = ""
        return ContainerList([self])._repr_html_() + notes + held


class ContainerList(list[Container]):
    """Containers that display themselves as `docker ps` does."""

    header = ("CONTAINER ID", "IMAGE", "COMMAND", "CREATED", "STATUS", "NAMES")

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        return [container.row() for container in self]

    def __repr__(self) -> str:
        return table_text(self.header, self.rows())

    @without_formulas
    def _repr_html_(self) -> str:
        return table_html(self.header, self.rows())


def _collect(attachment: Attachment, *, stream: bool, demux: bool, wanted: set[str] | None = None) -> Any:
    def pieces() -> Iterator[Any]:
        with attachment:
            for name, data in attachment:
                if wanted is None or name in wanted:
                    yield ((data, None) if name == "stdout" else (None, data)) if demux else data

    if stream:
        found = pieces()
        # Who drops it, even before the first piece, has detached; who dies has not.
        weakref.finalize(found, attachment.close).atexit = False
        return found
    if not demux:
        return b"".join(pieces())
    both = list(pieces())
    out = b"".join(data for data, _ in both if data is not None)
    err = b"".join(data for _, data in both if data is not None)
    return (out or None, err or None)


def find_image(container: Container) -> Image | None:
    """Its image, None when that is gone."""
    try:
        return container.image
    except NoSuchImage:
        return None


def disk_bytes(path: str | os.PathLike[str]) -> int:
    """Disk space of a tree, as far as this user may look."""
    total = 0
    for directory, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(directory, name)).st_blocks * 512
            except OSError:
                pass
    return total
