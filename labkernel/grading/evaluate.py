"""The grader's own process: checks as JSON on stdin, results as JSON on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

from ..engine import Engine
from ..errors import ContainerExit, LabkernelError


class Wrong(Exception):
    """The state is not what the check asks for; the message tells a student what was seen instead."""


def image_exists(lab: Engine, name: str) -> str:
    return str(lab.images.get(name).short_id)


def image_env(lab: Engine, name: str, variable: str, value: str | None) -> str:
    env = dict(entry.partition("=")[::2] for entry in lab.images.get(name).config.get("Env") or [])
    if variable not in env:
        raise Wrong(f"{variable} is not set; set are: {', '.join(sorted(env)) or 'none'}")
    if value is not None and env[variable] != value:
        raise Wrong(f"{variable} is “{env[variable]}”")
    return ""


def image_workdir(lab: Engine, name: str, path: str) -> str:
    seen = lab.images.get(name).config.get("WorkingDir") or "/"
    if seen.rstrip("/") != path.rstrip("/"):
        raise Wrong(f"its working directory is {seen}")
    return ""


def image_layers(lab: Engine, name: str, at_least: int) -> str:
    count = len(lab.images.get(name).layers)
    if count < at_least:
        raise Wrong(f"it has {count}")
    return f"it has {count}"


def image_prints(lab: Engine, name: str, text: str, command: list[str] | None, status: int) -> str:
    try:
        output, seen = lab.containers.run(name, command, remove=True, network_mode="none"), 0
    except ContainerExit as err:
        output, seen = (err.details or "").encode(), err.status
    if seen != status:
        raise Wrong(f"it ended with {seen}")
    shown = output.decode(errors="replace").strip() if isinstance(output, bytes) else ""
    if text not in shown:
        raise Wrong(f"it printed “{shown[:120]}”")
    return ""


def container_exists(lab: Engine, name: str) -> str:
    return str(lab.containers.get(name).status)


def container_image(lab: Engine, name: str, image: str) -> str:
    seen, wanted = lab.containers.get(name).attrs["Image"], lab.images.get(image).id
    if seen != wanted:
        raise Wrong(f"its image is {seen[7:19]}, and {image} is {wanted[7:19]} now")
    return ""


def container_exited(lab: Engine, name: str, status: int) -> str:
    state = lab.containers.get(name).attrs["State"]
    if state["Status"] != "exited":
        raise Wrong(f"it is {state['Status']}")
    if state["ExitCode"] != status:
        raise Wrong(f"it ended with {state['ExitCode']}")
    return ""


def container_running(lab: Engine, name: str) -> str:
    status = lab.containers.get(name).status
    if status != "running":
        raise Wrong(f"it is {status}")
    return ""


def container_limited(lab: Engine, name: str, memory: str | int | None, cpus: float | None) -> str:
    host = lab.containers.get(name).attrs["HostConfig"]
    if memory is not None and host["Memory"] != memory_bytes(memory):
        raise Wrong(f"its memory limit is {host['Memory'] or 'none'}")
    if cpus is not None and host["NanoCpus"] != round(cpus * 1e9):
        seen = f"{host['NanoCpus'] / 1e9:g}" if host["NanoCpus"] else ""
        raise Wrong(f"its CPU limit is {seen or 'none'}")
    return ""


def container_logged(lab: Engine, name: str, text: str) -> str:
    seen = bytes(lab.containers.get(name).logs()).decode(errors="replace")
    if text not in seen:
        raise Wrong(f"it logged “{seen.strip()[-120:]}”")
    return ""


def memory_bytes(words: str | int) -> int:
    """`"64m"` as docker reads it."""
    if isinstance(words, int):
        return words
    number = words.lower().rstrip("ib")
    scale = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}.get(number[-1:], 1)
    return int(float(number.rstrip("kmg")) * scale)


EVALUATORS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (
        *(image_exists, image_env, image_workdir, image_layers, image_prints),
        *(container_exists, container_image, container_exited, container_running, container_limited, container_logged),
    )
}


def evaluate(lab: Engine, record: dict[str, Any]) -> dict[str, Any]:
    """One check's record to one result's record. A wrong answer and a clear error of the engine both give 0 points."""
    try:
        message, ok = EVALUATORS[record["kind"]](lab, record["subject"], **record["facts"]), True
    except (Wrong, LabkernelError) as err:
        message, ok = str(err), False
    points = record["points"]
    return {
        "title": record["title"],
        "ok": ok,
        "points": points if ok else 0.0,
        "max_points": points,
        "message": message,
    }


def main() -> None:
    with Engine.open() as lab:
        json.dump([evaluate(lab, record) for record in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
