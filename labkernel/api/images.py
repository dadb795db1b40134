"""Images: list, pull, import, load, save, push, tag, history, search, remove, prune, commit. Source: Docker Engine
API, "Image"."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import LabkernelError, NoSuchImage, UsageError
from ..imaging.filters import is_meant
from ..imaging.lookups import given_logins, search
from ..imaging.pulls import LayerState, Pulls, parse_name
from ..imaging.pushes import Pushes
from .call import Call
from .errors import ApiError
from .records import Emit, send
from .routes import Route

if TYPE_CHECKING:
    from ..engine import Engine
    from ..imaging.image import Image

_STEPS = ("Downloading", "Pushing", "Extracting", "Verifying Checksum")


# -- looking -----------------------------------------------------------------------------------------------------------


def listing(call: Call) -> Any:
    filters: dict[str, Any] = call.filters()
    if call.query("filter"):
        filters.setdefault("reference", []).append(call.query("filter"))
    if "dangling" in filters:
        filters["dangling"] = filters["dangling"][0].lower() in ("1", "true")
    for name in ("before", "since", "until"):
        if isinstance(filters.get(name), list):
            filters[name] = filters[name][0]
    counts: dict[str, int] = {}
    for container in call.engine.containers.list(all=True):
        counts[container.image_id] = counts.get(container.image_id, 0) + 1
    found = call.engine.images.list(all=call.flag("all"), filters=filters)
    patterns = filters.get("reference") or []
    return [_summary(call, image, counts.get(image.id, 0), patterns) for image in found]


def _summary(call: Call, image: Image, containers: int, patterns: Sequence[str]) -> dict[str, Any]:
    """A row of the list; of the names only those that `patterns` ask for."""
    old = {"VirtualSize": image.size_bytes} if call.version < (1, 44) else {}
    return {
        "Id": image.id,
        "ParentId": "",
        "RepoTags": [tag for tag in image.tags if not patterns or is_meant(tag, patterns)],
        "RepoDigests": image.repo_digests,
        "Created": int(image.created),
        "Size": image.size_bytes,
        "SharedSize": -1,
        "Labels": image.labels or None,
        "Containers": containers if call.flag("shared-size") else -1,
        **old,
    }


def _get(call: Call) -> Image:
    try:
        return call.engine.images.get(call.params["name"])
    except NoSuchImage as err:
        name = err.name if ":" in err.name.rpartition("/")[2] or "@" in err.name else f"{err.name}:latest"
        raise ApiError(404, f"No such image: {name}") from None


def inspect(call: Call) -> Any:
    found = _get(call).attrs
    # Docker has left this out since 1.45, and ever since the first docker-compose, which looks there for the volumes of
    # an image, ends with a KeyError when it makes a container anew.
    return {**found, "ContainerConfig": found.get("Config") or {}}


def history(call: Call) -> Any:
    return _get(call).history()


def find_images(call: Call) -> Any:
    filters = call.filters()
    limit = call.number("limit") or 25
    if not 1 <= limit <= 100:
        raise UsageError(f"Limit {limit} is outside the range of [1, 100]")
    word = (filters.get("stars") or ["0"])[0]
    if not word.isdecimal():
        raise UsageError(f"invalid filter 'stars={word}'")
    stars = int(word)
    found = search(call.engine.pulls, call.query("term"), limit=limit)
    official = (filters.get("is-official") or [""])[0].lower()
    return [
        each
        for each in found
        if each["star_count"] >= stars and (not official or each["is_official"] == (official in ("1", "true")))
    ]


# -- names -------------------------------------------------------------------------------------------------------------


def tag(call: Call) -> Any:
    repository, word = call.query("repo"), call.query("tag")
    if not repository:
        raise UsageError("repository name can't be empty")
    call.engine.images.tag(_get(call).id, f"{repository}:{word}" if word else repository)
    return call.answer(201)


def remove(call: Call) -> Any:
    return call.engine.images.remove(call.params["name"], force=call.flag("force"))


def prune(call: Call) -> Any:
    filters: dict[str, Any] = call.filters()
    if "dangling" in filters:
        filters["dangling"] = filters["dangling"][0].lower() in ("1", "true")
    if isinstance(filters.get("until"), list):
        filters["until"] = filters["until"][0]
    return call.engine.images.prune(filters)


# -- moving ------------------------------------------------------------------------------------------------------------


def _logins(call: Call, ref: str) -> Any:
    return given_logins(call.headers.get("X-Registry-Auth", ""), parse_name(ref).domain)


class _Watch:
    """Tells the states of layers as docker does: each change, and the bytes of those under way."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._told: dict[str, tuple[str, int]] = {}

    def __call__(self, layers: Sequence[LayerState]) -> None:
        for layer in layers:
            moving = layer.status in _STEPS
            now = (layer.status, layer.current if moving else 0)
            if self._told.get(layer.id) == now:
                continue
            self._told[layer.id] = now
            detail = {"current": layer.current, "total": layer.total} if moving else {}
            bar = {"progress": _bar(layer)} if moving else {}
            self._emit({"status": layer.status, "progressDetail": detail, **bar, "id": layer.id})


def _bar(layer: LayerState) -> str:
    filled = int(50 * layer.current / layer.total) if layer.total else 0
    return f"[{'=' * filled}>{' ' * (50 - filled)}]  {layer.current}B/{layer.total}B"[:200]


async def create(call: Call) -> Any:
    """Pull (`fromImage`) or import (`fromSrc`)."""
    if call.query("fromSrc"):
        await send(call, lambda emit: _import(call, emit))
        return None
    name = call.query("fromImage")
    if not name:
        raise UsageError("fromImage or fromSrc is needed")
    await send(call, lambda emit: _pull(call, name, emit))
    return None


def _pull(call: Call, name: str, emit: Emit) -> None:
    word = call.query("tag")
    engine = call.engine
    if word:
        name = f"{name}{'@' if word.startswith('sha256:') else ':'}{word}"
    elif ":" not in name.rpartition("/")[2] and "@" not in name:
        # docker: without a tag, all of them
        for each in engine.pulls.tags(name):
            _pull_one(call, f"{name}:{each}", emit)
        return
    _pull_one(call, name, emit)


def _pull_one(call: Call, name: str, emit: Emit) -> None:
    engine, wanted = call.engine, parse_name(name)
    if engine.images.is_builtin(wanted) or not engine.images.registry_answers(wanted.domain, fresh=True):
        _take_builtin(engine, name, emit)
        return
    pulls = Pulls(engine.images, credentials=_logins(call, name))
    try:
        done = pulls.pull(
            name,
            platform=call.query("platform") or None,
            notify=lambda line: emit({"status": line}),
            watch=_Beginning(emit, {"status": f"Pulling from {wanted.path}", "id": wanted.digest or wanted.tag}),
        )
    except LabkernelError as err:
        status = getattr(err, "status", None)
        if status in (401, 403, 404):
            raise ApiError(404, err.brief) from None
        raise
    emit({"status": f"Digest: {done.digest}"})
    what = "Downloaded newer image" if done.new else "Image is up to date"
    emit({"status": f"Status: {what} for {wanted.familiar}"})


class _Beginning:
    """A watch that says first what is being pulled: not before the registry has answered."""

    def __init__(self, emit: Emit, first: dict[str, Any]) -> None:
        self._emit = emit
        self._first: dict[str, Any] | None = first
        self._watch = _Watch(emit)

    def __call__(self, layers: Sequence[LayerState]) -> None:
        if self._first is not None:
            self._emit(self._first)
            self._first = None
        self._watch(layers)


def _take_builtin(engine: Engine, name: str, emit: Emit) -> None:
    known = engine.images.find(name) is not None
    engine.images.resolve(name, notify=lambda line: emit({"status": line}), ask=False)
    what = "Image is up to date" if known else "Downloaded newer image"
    emit({"status": f"Status: {what} for {parse_name(name).familiar}"})


def _import(call: Call, emit: Emit) -> None:
    source = call.query("fromSrc")
    where: Any = call.reader()
    if source != "-":
        where = _fetched(call.engine, source, emit)
    repository, _, word = call.query("repo").partition("@")[0].rpartition(":")
    if not repository or "/" in word:
        repository, word = call.query("repo"), call.query("tag")
    image = call.engine.images.import_tar(
        where,
        repository or None,
        (word or call.query("tag") or None) if repository else None,
        call.queries("changes"),
        message=call.query("message"),
    )
    emit({"status": image.id})


def _fetched(engine: Engine, source: str, emit: Emit) -> str:
    from ..building.sources import download

    url = source if "://" in source else f"http://{source}"
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"unsupported URL: {source}")
    emit({"status": f"Downloading from {url}"})
    return os.fspath(download(url, engine.layout, checksum=None).path)


async def push(call: Call) -> Any:
    await send(call, lambda emit: _push(call, emit))
    return None


def _push(call: Call, emit: Emit) -> None:
    engine, name, word = call.engine, call.params["name"], call.query("tag")
    wanted = parse_name(f"{name}:{word}" if word else name)
    given = ":" in name.rpartition("/")[2] or word
    names = [str(wanted)] if given else list(engine.images.names(wanted.name))
    if not names or not any(engine.images.find(each) for each in names):
        raise ApiError(
            404, f"An image does not exist locally with the tag: {wanted.name.removeprefix('docker.io/library/')}"
        )
    pushes = Pushes(engine.images, Pulls(engine.images, credentials=_logins(call, name)))
    emit({"status": f"The push refers to repository [{wanted.name}]"})
    for each in names:
        done = pushes.push(each, notify=lambda line: emit({"status": line}), watch=_Watch(emit))
        label = each.rpartition(":")[2]
        emit({"status": f"{label}: digest: {done.digest} size: {done.size_bytes}"})
        emit({"progressDetail": {}, "aux": {"Tag": label, "Digest": done.digest, "Size": done.size_bytes}})


async def load(call: Call) -> Any:
    def work(emit: Emit) -> None:
        call.engine.images.load(call.reader(), notify=lambda line: emit({"stream": f"{line}\n"}))

    await send(call, work)
    return None


async def save_one(call: Call) -> Any:
    await _save(call, [call.params["name"]])
    return None


async def save(call: Call) -> Any:
    names = [word for given in call.queries("names") for word in given.split(",") if word]
    if not names:
        raise UsageError("no image is named", resolution="?names=NAME")
    await _save(call, names)
    return None


async def _save(call: Call, names: Iterable[str]) -> None:
    wanted = list(names)

    def check() -> None:
        for name in wanted:
            call.engine.images.get(name)

    await call.thread(check)

    def work(emit: Any) -> None:
        reading, writing = os.pipe2(os.O_CLOEXEC)
        failed: list[BaseException] = []

        def write() -> None:
            try:
                with open(writing, "wb") as out:
                    call.engine.images.save(wanted, out)
            except BaseException as err:
                failed.append(err)

        writer = threading.Thread(target=write, name="labkernel-save", daemon=True)
        writer.start()
        try:
            with open(reading, "rb", buffering=0) as source:
                while data := source.read(1 << 18):
                    emit(data)
        finally:
            writer.join()
        # A reader that left makes the writer fail with EPIPE, which is no news.
        if failed:
            raise failed[0]

    await call.begin(200, Content_Type="application/x-tar")
    async for pieces in call.produce(work):
        await call.write(b"".join(pieces))


# -- commit ------------------------------------------------------------------------------------------------------------


def commit(call: Call) -> Any:
    container = call.engine.containers.get(call.query("container"))
    image = container.commit(
        call.query("repo") or None,
        call.query("tag") or None,
        message=call.query("comment") or None,
        author=call.query("author") or None,
        pause=call.flag("pause", default=True),
        changes=[line for words in call.queries("changes") for line in words.splitlines() if line.strip()] or None,
        conf=_config(call.body or {}),
    )
    return call.answer(201, {"Id": image.id})


def _config(given: dict[str, Any]) -> dict[str, Any] | None:
    """What a commit's body says of the image; clients send the container's whole configuration with empty fields."""
    keys = ("Cmd", "Entrypoint", "Env", "ExposedPorts", "Labels", "User", "Volumes", "WorkingDir", "Healthcheck",
            "StopSignal", "OnBuild", "Shell")  # fmt: skip
    return {key: given[key] for key in keys if given.get(key)} or None


ROUTES = (
    Route("GET", "/images/json", listing),
    Route("GET", "/images/search", find_images, slow=True),
    Route("GET", "/images/get", save, bulk=True),
    Route("POST", "/images/create", create, bulk=True),
    Route("POST", "/images/load", load, bulk=True),
    Route("POST", "/images/prune", prune, slow=True),
    Route("GET", "/images/{name:path}/json", inspect),
    Route("GET", "/images/{name:path}/history", history),
    Route("GET", "/images/{name:path}/get", save_one, bulk=True),
    Route("POST", "/images/{name:path}/push", push),
    Route("POST", "/images/{name:path}/tag", tag),
    Route("DELETE", "/images/{name:path}", remove, slow=True),
    Route("POST", "/commit", commit, body=dict | None, slow=True),
)
