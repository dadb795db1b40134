"""Containers: create, list, look at, start, stop, change, remove. Streams and files are in `attach`, `logs`, `files`.

Source: Docker Engine API, "Container".
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import LabkernelError, NoSuchContainer, NoSuchImage, NotFoundError, StartError, UsageError
from ..measuring.stats import stats_of_ended
from .call import Answer, Call
from .configs import Config, Update, changes_of, settings_of
from .errors import ApiError
from .routes import Route

if TYPE_CHECKING:
    from ..running.container import Container

LONGEST_S = 100 * 365 * 86400.0


def find(call: Call) -> Container:
    """The container a path names. Raises NoSuchContainer."""
    return call.engine.containers.get(call.params["name"])


def create(call: Call) -> Any:
    config: Config = call.body
    if not config.image:
        raise UsageError("no image was given: config cannot be empty in order to create a container")
    command, settings = settings_of(config)
    for name in ("name", "platform"):
        if call.query(name):
            settings[name] = call.query(name)
    # A client pulls what is missing itself, when it is told so: the engine must not do it for it.
    _check_image(call.engine.images, config.image, settings.get("platform"))
    try:
        container = call.engine.containers.create(config.image, command or None, **settings)
    except NoSuchImage:
        raise
    except NotFoundError as err:
        # Of a network or a container to share with. Docker's client takes any 404 for the image's and pulls that.
        raise ApiError(400, err.brief) from err
    return call.answer(201, {"Id": container.id, "Warnings": container.warnings})


def _check_image(images: Any, name: str, platform: str | None) -> None:
    """Raises NoSuchImage (404), also when the image is here for another platform only."""
    image = images.get(name)
    if platform and images.find(name, platform=platform) is None:
        raise ApiError(
            404,
            f"image with reference {name} was found but does not match the specified platform: "
            f"wanted {platform}, actual: linux/{image.architecture}",
        )


def listing(call: Call) -> Any:
    limit = call.number("limit", 0) or 0
    found = call.engine.containers.list(
        call.flag("all"), filters=call.filters() or None, limit=limit if limit > 0 else None
    )
    rows = []
    for container in found:
        try:
            rows.append(row_of(container, size=call.flag("size")))
        except NoSuchContainer:
            continue  # removed a moment ago
    return rows


def row_of(container: Container, *, size: bool) -> dict[str, Any]:
    """A container as the listing has it and saw it. Raises NoSuchContainer when it has just gone."""
    from ..display import joined_command, status_words
    from ..running.inspection import summarize_container

    state = container.seen or container.runtime_state()
    summary = summarize_container(container, state)
    args = [summary["Path"], *summary["Args"]]
    row = {
        "Id": container.id,
        "Names": [f"/{container.name}"],
        "Image": container.image_ref,
        "ImageID": container.image_id,
        "Command": joined_command([word for word in args if word]),
        "Created": int(container.created_at),
        "Ports": _ports(summary["NetworkSettings"]["Ports"]),
        "Labels": container.labels,
        "State": summary["State"]["Status"],
        "Status": status_words(state),
        "HostConfig": {"NetworkMode": summary["HostConfig"]["NetworkMode"]},
        "NetworkSettings": {"Networks": summary["NetworkSettings"]["Networks"]},
        "Mounts": summary["Mounts"],
    }
    if size:
        row["SizeRw"], row["SizeRootFs"] = container.sizes()
    return row


def _ports(bindings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`{"80/tcp": [{"HostIp", "HostPort"}]}` as the listing has it."""
    found: list[dict[str, Any]] = []
    for inside, outside in bindings.items():
        number, _, proto = inside.partition("/")
        port = {"PrivatePort": int(number), "Type": proto or "tcp"}
        found += [{"IP": each["HostIp"], **port, "PublicPort": int(each["HostPort"])} for each in outside or ()]
        if not outside:
            found.append(port)
    return found


def inspect(call: Call) -> Any:
    from .execs import Execs

    container = find(call)
    document = container.attrs
    document["ExecIDs"] = call.host.shared(Execs).ids_of(container.id) or None
    if call.flag("size"):
        document["SizeRw"], document["SizeRootFs"] = container.sizes()
    return document


def start(call: Call) -> Any:
    container = find(call)
    if container.status == "running":
        return Answer(304)
    try:
        container.start()
    except StartError:
        # As with docker it has gone by the time the answer comes, not a moment later.
        if container.settings.get("auto_remove"):
            with suppress(LabkernelError):
                container.remove(force=True)
        raise
    return None


def stop(call: Call) -> Any:
    container = find(call)
    if container.status not in ("running", "paused", "restarting"):
        return Answer(304)
    container.stop(timeout=_timeout(call), signal=call.query("signal") or None)
    return None


def restart(call: Call) -> Any:
    container = find(call)
    if call.query("signal"):
        container.stop(timeout=_timeout(call), signal=call.query("signal"))
    container.restart(timeout=_timeout(call))
    return None


def _timeout(call: Call) -> float | None:
    seconds = call.number("t")
    return None if seconds is None else min(float(seconds), LONGEST_S)


def kill(call: Call) -> Any:
    find(call).kill(call.query("signal") or None)


def pause(call: Call) -> Any:
    find(call).pause()


def unpause(call: Call) -> Any:
    find(call).unpause()


def rename(call: Call) -> Any:
    name = call.query("name")
    if not name:
        raise UsageError("Neither old nor new names may be empty")
    find(call).rename(name)


def update(call: Call) -> Any:
    given: Update = call.body
    done = find(call).update(**changes_of(given))
    return {"Warnings": done["Warnings"]}


def resize(call: Call) -> Any:
    container = find(call)
    container.resize(*size_of(call))
    return call.answer(200)


def size_of(call: Call) -> tuple[int, int]:
    """(rows, columns) of the query. Raises UsageError."""
    rows, columns = call.number("h", 0) or 0, call.number("w", 0) or 0
    if not (0 <= rows < 1 << 16 and 0 <= columns < 1 << 16):
        raise UsageError(f"invalid size of a terminal: {rows}x{columns}")
    return rows, columns


def top(call: Call) -> Any:
    return find(call).top(ps_args=call.query("ps_args") or None)


def changes(call: Call) -> Any:
    return find(call).diff() or Answer(200, b"null\n", {"Content-Type": "application/json"})


def prune(call: Call) -> Any:
    return call.engine.containers.prune(call.filters())


def remove(call: Call) -> Any:
    find(call).remove(force=call.flag("force"), v=call.flag("v"), link=call.flag("link"))


async def wait(call: Call) -> Any:
    """The headers go out once the supervisor waits: a client starts the container when it has them."""
    condition = call.query("condition") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise UsageError(f'invalid condition: "{condition}"')
    container = await call.thread(find, call)
    pending = await call.thread(call.engine.runtime.begin_wait, container.id, condition)
    try:
        await call.begin(200, Content_Type="application/json")
        ended = None
        while ended is None:
            await call.unless_gone(readable(pending.fileno()))
            ended = await call.thread(pending.result)
    finally:
        pending.close()
    if condition == "removed":
        await call.thread(_forget, call, container.id)
    # Error is for a removal that failed; why a start failed is what the start answers.
    await call.write(msgspec.json.encode({"StatusCode": ended.exit_code, "Error": None}) + b"\n")
    return None


def _forget(call: Call, id: str) -> None:
    """Drop the row, and the anonymous volumes, of a container that has removed itself."""
    try:
        call.engine.containers.get(id)
    except NoSuchContainer:
        pass


async def readable(fd: int) -> None:
    """Returns when a descriptor can be read."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, wake)
    try:
        await ready
    finally:
        loop.remove_reader(fd)


async def stats(call: Call) -> Any:
    container = await call.thread(find, call)
    if not call.flag("stream", default=True):
        one_shot = call.flag("one-shot")
        return await call.alone(_one_reading, container, one_shot)
    await call.begin(200, Content_Type="application/json")
    await call.lines(call.iterate(lambda: container.stats(stream=True)))
    return None


def _one_reading(container: Container, one_shot: bool) -> Any:  # noqa: FBT001
    if not one_shot:
        return container.stats(stream=False)
    return next(iter(container.stats(stream=True)), None) or stats_of_ended(id=container.id, name=container.name)


ROUTES = (
    Route("POST", "/containers/create", create, body=Config),
    Route("GET", "/containers/json", listing),
    Route("POST", "/containers/prune", prune, slow=True),
    Route("GET", "/containers/{name}/json", inspect),
    Route("GET", "/containers/{name}/top", top),
    Route("GET", "/containers/{name}/changes", changes),
    Route("GET", "/containers/{name}/stats", stats),
    Route("POST", "/containers/{name}/start", start, slow=True),
    Route("POST", "/containers/{name}/stop", stop, slow=True),
    Route("POST", "/containers/{name}/restart", restart, slow=True),
    Route("POST", "/containers/{name}/kill", kill, slow=True),
    Route("POST", "/containers/{name}/pause", pause),
    Route("POST", "/containers/{name}/unpause", unpause),
    Route("POST", "/containers/{name}/wait", wait),
    Route("POST", "/containers/{name}/resize", resize),
    Route("POST", "/containers/{name}/rename", rename),
    Route("POST", "/containers/{name}/update", update, body=Update),
    Route("DELETE", "/containers/{name}", remove, slow=True),
)
