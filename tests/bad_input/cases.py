"""The mistakes, as data: what is typed, what is answered, and the same from Python."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bad_input.world import BUSYBOX, RUN, USED

from labkernel.engine import Engine
from labkernel.errors import (
    BuildError,
    ConflictError,
    DockerfileError,
    ImageError,
    InvalidReference,
    LabkernelError,
    LayerError,
    NoSuchContainer,
    NoSuchImage,
    StartError,
    UsageError,
)

MISSPELT = f"FROM {BUSYBOX}\n\nCOPPY a b\n"
MISSING = f"FROM {BUSYBOX}\nENV A=1\nCOPY nothing.txt /\n"


class Case(NamedTuple):
    """One mistake: the words of the terminal (and of `%docker`), exit code, brief, and the same from Python."""

    words: tuple[str, ...]
    code: int
    brief: str
    error: type[LabkernelError]
    call: Callable[[Engine, Path], Any]
    hint: str | None = ""
    cell: str | None = None


def _run(*command: str, image: str = BUSYBOX, **settings: Any) -> Callable[[Engine, Path], Any]:
    return lambda lab, _folder: lab.containers.run(image, list(command), remove=True, **settings)


def _import(name: str) -> Callable[[Engine, Path], Any]:
    return lambda lab, folder: lab.images.import_tar(folder / name, repository="lk-test/bad")


CASES: dict[str, Case] = {
    "unknown image": Case(
        (*RUN, "nobody/nothing:9", "true"), 125, "nobody/nothing:9", NoSuchImage, _run(image="nobody/nothing:9")
    ),
    "invalid reference": Case(
        (*RUN, "BusyBox"), 125, "must be lowercase", InvalidReference, _run("true", image="BusyBox")
    ),
    "command not found": Case(
        (*RUN, BUSYBOX, "no-such"), 127, '"no-such": executable file not found in $PATH', StartError, _run("no-such")
    ),
    "command's path not found": Case(
        (*RUN, BUSYBOX, "/no/such"), 127, "stat /no/such: no such file", StartError, _run("/no/such")
    ),
    "not executable": Case(
        (*RUN, BUSYBOX, "/etc/passwd"), 126, '"/etc/passwd": permission denied', StartError, _run("/etc/passwd")
    ),
    "a directory": Case((*RUN, BUSYBOX, "/etc"), 126, '"/etc": is a directory', StartError, _run("/etc")),
    "bad flag": Case(
        ("run", "--frob", BUSYBOX), 125, "unknown flag: --frob", UsageError, _run("true", frob=1), hint="--rm"
    ),
    "bad command": Case(
        ("runn", BUSYBOX), 1, "unknown command", UsageError, lambda lab, _: lab.containers.list(filters={"x": 1})
    ),
    "name in use": Case(
        ("run", "--name", "taken", BUSYBOX, "true"),
        125,
        'The container name "/taken" is already in use by container',
        ConflictError,
        _run("true", name="taken"),
        hint="container rm taken",
    ),
    "bad name": Case(
        ("run", "--name", "a b", BUSYBOX, "true"),
        125,
        "Invalid container name (a b)",
        UsageError,
        _run("", name="a b"),
        hint=None,
    ),
    "rename to a name in use": Case(
        ("create", "--name", "taken", BUSYBOX),
        1,
        "already in use",
        ConflictError,
        lambda lab, _: lab.containers.create(BUSYBOX, name="taken"),
    ),
    "no such container": Case(
        ("rm", "nobody"), 1, "No such container: nobody", NoSuchContainer, lambda lab, _: lab.containers.get("nobody")
    ),
    "exec in no such container": Case(
        ("exec", "nobody", "true"),
        1,
        "No such container: nobody",
        NoSuchContainer,
        lambda lab, _: lab.containers.get("nobody"),
    ),
    "exec in a container that does not run": Case(
        ("exec", "taken", "true"),
        1,
        "is not running",
        ConflictError,
        lambda lab, _: lab.containers.get("taken").exec_run("true"),
    ),
    "no such image to remove": Case(
        ("rmi", "nobody/nothing"),
        1,
        "No such image: nobody/nothing",
        NoSuchImage,
        lambda lab, _: lab.images.remove("nobody/nothing"),
    ),
    "image in use": Case(
        ("rmi", USED), 1, "is using", ConflictError, lambda lab, _: lab.images.remove(USED), hint="rm"
    ),
    "Dockerfile syntax": Case(
        ("build", "-q", "-f", "misspelt", "context"),
        1,
        "unknown instruction: COPPY (did you mean COPY?)",
        DockerfileError,
        lambda lab, _: lab.builds.build(MISSPELT),
        hint=None,
        cell=f"%%dockerfile -t lk-test/bad\n{MISSPELT}",
    ),
    "context file missing": Case(
        ("build", "-q", "-f", "missing", "-t", "lk-test/bad", "context"),
        1,
        "stat nothing.txt: file does not exist",
        BuildError,
        lambda lab, folder: lab.builds.build(MISSING, context=folder / "context", tags=["lk-test/bad"]),
        hint="context",
        cell=f"%%dockerfile -t lk-test/bad\n{MISSING}",
    ),
    "no such context": Case(
        ("build", "-f", "missing", "nowhere"),
        1,
        "path 'nowhere' not found",
        LabkernelError,
        lambda lab, folder: lab.builds.build(MISSING, context=folder / "nowhere"),
    ),
    "bad tag of a build": Case(
        ("build", "-q", "-t", "Bad", "-f", "missing", "context"),
        125,
        "must be lowercase",
        InvalidReference,
        lambda lab, folder: lab.builds.build(MISSING, context=folder, tags=["Bad"]),
    ),
    "memory too small": Case(
        (*RUN, "-m", "1k", BUSYBOX), 125, "Minimum memory limit allowed is 6MB", UsageError, _run("x", mem_limit="1k")
    ),
    "memory no number": Case(
        (*RUN, "-m", "12q", BUSYBOX), 125, "invalid size: '12q'", UsageError, _run("x", mem_limit="12q")
    ),
    "too many CPUs": Case(
        (*RUN, "--cpus", "4096", BUSYBOX),
        125,
        "Range of CPUs",
        UsageError,
        _run("x", nano_cpus=4096 * 10**9),
        hint=None,
    ),
    "bad volume": Case(
        (*RUN, "-v", "a:b:c:d", BUSYBOX),
        125,
        "invalid volume specification: 'a:b:c:d'",
        UsageError,
        _run("x", volumes=["a:b:c:d"]),
    ),
    "relative volume target": Case(
        (*RUN, "-v", "x:relative", BUSYBOX),
        125,
        "must be absolute",
        UsageError,
        _run("x", volumes=["x:relative"]),
        hint=None,
    ),
    "unknown user": Case(
        (*RUN, "-u", "nosuch", BUSYBOX, "id"),
        125,
        "unable to find user nosuch",
        StartError,
        _run("id", user="nosuch"),
        hint=None,
    ),
    "unknown group": Case(
        (*RUN, "-u", "0:nosuch", BUSYBOX, "id"),
        125,
        "unable to find group nosuch",
        StartError,
        _run("id", user="0:nosuch"),
        hint=None,
    ),
    "relative workdir": Case(
        (*RUN, "-w", "rel", BUSYBOX, "pwd"),
        125,
        "needs to be an absolute path",
        UsageError,
        _run("x", working_dir="r"),
        hint=None,
    ),
    "workdir is a file": Case(
        (*RUN, "-w", "/etc/passwd", BUSYBOX, "pwd"),
        126,
        "not a directory",
        StartError,
        _run("pwd", working_dir="/etc/passwd"),
    ),
    "unknown network": Case(
        ("run", "--network", "nope", BUSYBOX), 125, "network nope not found", LabkernelError, _run(network="nope")
    ),
    "unknown capability": Case(
        (*RUN, "--cap-add", "NOPE", BUSYBOX),
        125,
        'unknown capability: "CAP_NOPE"',
        UsageError,
        _run(cap_add=["NOPE"]),
        hint=None,
    ),
    "no seccomp profile": Case(
        (*RUN, "--security-opt", "seccomp=/no/such.json", BUSYBOX, "true"),
        125,
        "/no/such.json",
        LabkernelError,
        _run("true", security_opt=["seccomp=/no/such.json"]),
        hint=None,
    ),
    "no env file": Case(
        (*RUN, "--env-file", "/no/such", BUSYBOX), 125, "/no/such", UsageError, _run(environment=["=x"]), hint=None
    ),
    "garbage for a tar": Case(("import", "garbage.tar", "lk-test/bad"), 125, "tar", ImageError, _import("garbage.tar")),
    "tar cut short": Case(("import", "cut.tar", "lk-test/bad"), 125, "ends", LayerError, _import("cut.tar")),
    "tar that leaves its root": Case(
        ("import", "leaving.tar", "lk-test/bad"), 125, "leaves the root", LayerError, _import("leaving.tar"), hint=None
    ),
    "no such tar": Case(
        ("import", "/no/such.tar", "x"), 1, "/no/such.tar", LabkernelError, _import("nowhere.tar"), hint=None
    ),
    "garbage to load": Case(
        ("load", "-i", "garbage.tar"),
        125,
        "damaged",
        ImageError,
        lambda lab, folder: lab.images.load(io.BytesIO((folder / "garbage.tar").read_bytes())),
        hint="import",
    ),
}
