"""docker's flags of `build` that have a little language of their own, and where a finished build goes (`--output`)."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct

from ..errors import UsageError
from . import resourceflags
from .grammar import flag, many, option
from .settings import ulimit

if TYPE_CHECKING:
    from ..building.remotecache import CachePlace
    from ..builds import BuildOptions, BuildResult
    from .host import Host

BUILD_FLAGS = [
    many("-t", "--tag", metavar="name", help="Name and optionally a tag (format: name:tag)"),
    many("--build-arg", help="Set build-time variables (K=V, or K to pass ours on)"),
    option("--target", metavar="string", help="Set the target build stage to build"),
    flag("--no-cache", help="Do not use cache when building the image"),
    many("--no-cache-filter", metavar="stringArray", help="Do not cache specified stages"),
    flag("--pull", help="Always attempt to pull all referenced images"),
    many("--label", help="Set metadata for an image"),
    many("--secret", metavar="stringArray", help="Secret to expose to the build (id=mysecret[,src=FILE|env=NAME])"),
    many(
        "--ssh",
        metavar="stringArray",
        help="SSH agent socket or keys to expose to the build (default|<id>[=<socket>|<key>[,<key>]])",
    ),
    option("--network", metavar="string", default="default", help="Set the networking mode for RUN instructions"),
    many("--add-host", metavar="strings", help="Add a custom host-to-IP mapping (host:ip)"),
    option("-m", "--memory", metavar="bytes", help="Memory limit of each RUN instruction"),
    *resourceflags.SHARED,
    option("--shm-size", metavar="bytes", help="Size of /dev/shm of each RUN instruction"),
    many("--ulimit", metavar="ulimit", help="Ulimit options of each RUN instruction (name=soft[:hard])"),
    many(
        "--build-context", metavar="stringArray", help="Additional build contexts (name=path|URL|docker-image://NAME)"
    ),
    many(
        "--allow",
        metavar="stringArray",
        help="Allow extra privileged entitlement (network.host, security.insecure, device)",
    ),
    many("--platform", metavar="stringArray", help="Set target platform for build"),
    many("--cache-from", metavar="stringArray", help="External cache sources (type=local|registry,src=DIR|ref=NAME)"),
    many("--cache-to", metavar="stringArray", help="Cache export destinations (type=local|registry|inline)"),
    many("-o", "--output", metavar="stringArray", help="Output destination (type=local|tar|oci|docker,dest=PATH)"),
    flag("--load", help='Shorthand for "--output=type=image": what is built is always in the store', hidden=True),
    flag("--check", help="Check the Dockerfile and build nothing"),
    flag("-q", "--quiet", help="Suppress the build output and print image ID on success"),
    option(
        "--progress",
        metavar="string",
        type=click.Choice(["auto", "plain", "tty", "quiet", "json", "rawjson"]),
        default="auto",
        help="Set type of progress output (auto, plain, tty, quiet, json)",
    ),
    option("--iidfile", metavar="string", help="Write the image ID to the file"),
    flag("--rm", help="Remove intermediate containers after a successful build", hidden=True),
    flag("--force-rm", help="Always remove intermediate containers", hidden=True),
]


def build_flags(function: Any) -> Any:
    """Decorates a command with docker's flags of `build`."""
    for decorate in reversed(BUILD_FLAGS):
        function = decorate(function)
    return function


def options_of(host: Host, flags: dict[str, Any]) -> BuildOptions:
    """The flags as BuildOptions. Reads the files and variables of secrets. Raises UsageError."""
    from ..builds import BuildOptions
    from ..runtime.settings import parse_size

    return BuildOptions(
        secrets=dict(_secret(host, word) for word in flags["secret"]),
        ssh=dict(_agent(host, word) for word in flags["ssh"]),
        allow=flags["allow"],
        no_cache_filter=[name for word in flags["no_cache_filter"] for name in word.split(",")],
        pull=flags["pull"],
        extra_hosts=[_extra_host(word) for word in flags["add_host"]],
        memory_bytes=parse_size(flags["memory"], "memory limit") if flags["memory"] else 0,
        limits=_limits(flags),
        platform=",".join(flags["platform"]) or None,
        context_epoch_s=flags.get("context_epoch_s"),
        cache_from=[_cache_place(host, word, "cache-from", "src") for word in flags["cache_from"]],
        cache_to=[_cache_place(host, word, "cache-to", "dest") for word in flags["cache_to"]],
    )


def _limits(flags: dict[str, Any]) -> dict[str, Any]:
    """What is given of `BuildOptions.limits`, as a container takes it."""
    names = ("shm_size", "cpu_shares", "cpu_period", "cpu_quota", "cpuset_cpus", "cpuset_mems")
    found = {name: flags[name] for name in names if flags[name] is not None}
    if flags["memory_swap"] is not None:
        found["memswap_limit"] = flags["memory_swap"]
    if flags["ulimit"]:
        found["ulimits"] = [ulimit(word) for word in flags["ulimit"]]
    return found


def named_places(words: Sequence[str]) -> dict[str, str]:
    """`--build-context NAME=PLACE` as a dict. Raises UsageError."""
    found = {}
    for word in words:
        name, _, place = word.partition("=")
        if not name or not place:
            raise UsageError(f"invalid context value: {word}, expected key=value", exit_code=1)
        found[name] = place
    return found


def _fields(word: str, name: str) -> dict[str, str]:
    row = next(csv.reader([word]), [])
    fields: dict[str, str] = {}
    for part in row:
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"invalid value for --{name}: field {part!r} must be a key=value pair", exit_code=1)
        fields[key.strip().lower()] = value
    return fields


def _secret(host: Host, word: str) -> tuple[str, bytes]:
    fields = _fields(word, "secret")
    name = fields.pop("id", "")
    kind = fields.pop("type", None)
    source, variable = fields.pop("src", fields.pop("source", None)), fields.pop("env", None)
    if not name or fields or kind not in (None, "file", "env"):
        raise UsageError(f"invalid secret: {word}", resolution="--secret id=NAME,src=FILE or id=NAME,env=VARIABLE")
    if kind == "env" and variable is None:
        variable, source = source or name, None
    if variable is None and source is None and name in os.environ:
        variable = name
    if variable is not None:
        if variable not in os.environ:
            raise UsageError(f"secret {name}: the environment has no variable {variable}", exit_code=1)
        return name, os.environb[os.fsencode(variable)]
    path = host.working_dir() / Path(source or name).expanduser()
    try:
        return name, path.read_bytes()
    except OSError as err:
        raise UsageError(
            f"failed to stat {path}: {(err.strerror or 'unreadable').lower()}",
            resolution="--secret id=NAME,src=FILE takes a file of this machine",
            exit_code=1,
        ) from None


def _agent(host: Host, word: str) -> tuple[str, list[str]]:
    """`ID[=SOCKET|KEY[,KEY]]`: the id, and the paths of a socket or of keys."""
    name, _, given = word.partition("=")
    given = given or os.environ.get("SSH_AUTH_SOCK", "")
    if not given:
        raise UsageError(
            "invalid empty ssh agent socket: SSH_AUTH_SOCK is not set",
            resolution="start one: eval $(ssh-agent), or give a key: --ssh default=KEYFILE",
            exit_code=1,
        )
    return name or "default", [str(host.working_dir() / Path(path).expanduser()) for path in given.split(",") if path]


def _extra_host(word: str) -> str:
    import ipaddress

    separator = "=" if "=" in word else ":"
    name, _, address = word.partition(separator)
    try:
        ipaddress.ip_address(address.strip("[]"))
    except ValueError:
        raise UsageError(f"invalid IP address in add-host: {address!r}", resolution="--add-host NAME:ADDRESS") from None
    if not name:
        raise UsageError(f"bad format for add-host: {word!r}", resolution="--add-host NAME:ADDRESS")
    return f"{name}:{address.strip('[]')}"


def _cache_place(host: Host, word: str, flag_name: str, key: str) -> CachePlace:
    from ..building.remotecache import CachePlace

    fields = _fields(word, flag_name) if "=" in word else {"type": "registry", "ref": word}
    kind = fields.get("type", "")
    if kind == "registry":
        if not fields.get("ref"):
            raise UsageError(f"--{flag_name} type=registry needs ref=NAME")
        return CachePlace(kind, fields["ref"])
    if kind == "inline" and flag_name == "cache-to":
        return CachePlace(kind)
    if kind != "local":
        inline = ", inline" if flag_name == "cache-to" else "; an inline cache is read with type=registry,ref=IMAGE"
        raise UsageError(
            f"--{flag_name} type={kind or '?'} is not supported",
            resolution=f"type=local,{key}=DIRECTORY, type=registry,ref=NAME{inline}",
        )
    if not fields.get(key):
        raise UsageError(f"--{flag_name} type=local needs {key}=DIRECTORY")
    return CachePlace(kind, str(host.working_dir() / Path(fields[key]).expanduser()))


# -- output ----------------------------------------------------------------------------------------------------------


class Output(Struct, frozen=True):
    """Where the build goes beside the store. `kind`: image, local, tar, oci or docker; `dest` "-" is stdout; `ignored`:
    what was asked for and is not done."""

    kind: str
    dest: str = ""
    name: str = ""
    ignored: tuple[str, ...] = ()


def check_outputs(outputs: Sequence[Output], platform: str | None) -> None:
    """Raises UsageError for an output that cannot hold several platforms."""
    from ..building.targets import targets

    if any(output.kind == "docker" and output.dest for output in outputs) and len(targets(platform)) > 1:
        raise UsageError(
            "docker exporter does not currently support exporting manifest lists",
            resolution="--output type=oci,dest=FILE holds several platforms, and so do type=local, type=tar and the "
            "store itself",
            exit_code=1,
        )


def outputs_of(words: Sequence[str]) -> list[Output]:
    """`--output`, also in its short form (`-o DIR`, `-o -`). Raises UsageError."""
    found = []
    for word in words:
        if "=" not in word:
            found.append(Output("tar", "-") if word == "-" else Output("local", word))
            continue
        fields = _fields(word, "output")
        kind = fields.get("type", "")
        if kind not in ("image", "local", "tar", "oci", "docker"):
            raise UsageError(
                f"--output type={kind or '?'} is not supported", resolution="type=local, tar, oci, docker or image"
            )
        if fields.get("push", "false").lower() not in ("false", "0"):
            raise UsageError("--output push=true is not supported", resolution="`labkernel push NAME` after the build")
        dest = fields.get("dest", "")
        if kind == "local" and not dest:
            raise UsageError("dest is required for local output", resolution="--output type=local,dest=DIRECTORY")
        if kind in ("tar", "oci") and not dest:
            dest = "-"
        _check_rewriting(fields.get("rewrite-timestamp"))
        ignored = tuple(sorted(set(fields) - _OUTPUT_KEYS))
        found.append(Output(kind, dest, fields.get("name", ""), ignored))
    return found


_OUTPUT_KEYS = {"type", "dest", "name", "push", "rewrite-timestamp"}


def _check_rewriting(value: str | None) -> None:
    """`rewrite-timestamp=true` is what SOURCE_DATE_EPOCH does here anyway, in layers and in files that go out."""
    if value is not None and value.lower() not in ("1", "t", "true", "0", "f", "false"):
        raise UsageError(f"non-bool value {value!r} specified for rewrite-timestamp", exit_code=1)


def write_output(host: Host, result: BuildResult, output: Output, names: Sequence[str] = ()) -> None:
    """Carry out one `--output`; `names` are the tags. Raises UsageError, StoreError."""
    from ..building.targets import directory_name, export_all, save_index
    from .container import tar_output

    images = host.engine.images
    if output.kind == "image" or (output.kind == "docker" and not output.dest):
        return
    several = getattr(result, "images", None) or {}
    if output.kind == "local":
        target = host.working_dir() / Path(output.dest).expanduser()
        for platform, image in several.items():
            host.engine.builds.export_directory(image.id, target / directory_name(platform))
        if not several:
            host.engine.builds.export_directory(result.image.id, target)
        return
    with tar_output(host, None if output.dest == "-" else output.dest) as out:
        if several and output.kind == "tar":
            export_all(images, several, out)
        elif several:
            save_index(images, several, names, out)
        elif output.kind == "tar":
            images.export_rootfs(result.image.id, out)
        else:
            images.save(result.image.tags or [result.image.id], out)


class JsonProgress:
    """`--progress json`: each BuildStep as a line of JSON on stderr."""

    def __init__(self, stream: Any = None) -> None:
        self._stream = stream or sys.stderr

    def __call__(self, step: Any) -> None:
        import json

        self._stream.write(json.dumps(step.to_dict()) + "\n")
        self._stream.flush()
