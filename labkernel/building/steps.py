"""What each Dockerfile instruction does to a stage: its config, its layers, its history, its variables.

One method per instruction. A step that touches files asks the cache by content first and only then makes a layer;
a step that changes the config is remembered too, so that a rebuild gives the same image, times included. Source:
Dockerfile reference; image-spec config.md; BuildKit's frontend for the wording of history.
"""

from __future__ import annotations

import copy
import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from ..dockerfile import instructions as ins
from ..dockerfile.graph import parse_port
from ..dockerfile.parser import Heredoc, parse_heredoc
from ..dockerfile.variables import PROXY_ARGS, Lexer
from ..errors import BuildError
from ..oci.config import timestamp
from ..store.catalog import LayerInfo
from .cache import BuildCache, digest_of, shortened
from .devices import granted_devices
from .layers import Later, LayerMaker, Running, Sandbox
from .mounts import RunMounts, attach, plan_mounts
from .transfer import plan_transfer, scan_stage

if TYPE_CHECKING:
    from ..imaging.image import Image
    from ..runtime.cdi import Device
    from ..store.layout import Layout
    from .context import Context

COMMENT = "labkernel.dockerfile.v0"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DEFAULT_SHELL = ("/bin/sh", "-c")


class State(msgspec.Struct):
    """A stage so far: an image without a name. `args` are the ARGs in scope, not part of the image: the value of each,
    as the last ARG or ENV of that name gave it, None where none did."""

    document: dict[str, Any]
    layers: list[LayerInfo] = msgspec.field(default_factory=list)
    args: dict[str, str | None] = msgspec.field(default_factory=dict)
    hidden: list[str] = msgspec.field(default_factory=list)
    mounts: list[dict[str, Any]] = msgspec.field(default_factory=list)
    command_set: bool = False

    @property
    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document.setdefault("config", {})
        return found

    @property
    def chain(self) -> str:
        """Identity of the file system: a digest of its diff IDs."""
        return digest_of([layer.diff_id for layer in self.layers])

    @property
    def environment(self) -> dict[str, str]:
        return dict(word.partition("=")[::2] for word in self.config.get("Env") or ())

    @property
    def arguments(self) -> dict[str, str]:
        """The ARGs that have a value."""
        return {name: value for name, value in self.args.items() if value is not None}

    def variables(self) -> dict[str, str]:
        """What `$NAME` may mean: of an ARG and an ENV of one name the later one holds, as BuildKit has it."""
        return {**self.environment, **self.arguments}

    def copy(self) -> State:
        """For another stage FROM this one, which inherits its ARGs too."""
        return State(
            copy.deepcopy(self.document),
            list(self.layers),
            dict(self.args),
            hidden=list(self.hidden),
            mounts=list(self.mounts),
        )

    @classmethod
    def of_image(cls, image: Image) -> State:
        hidden, mounts = image.host_masks
        document = copy.deepcopy(image.raw_config)
        document.setdefault("config", {})
        if document["config"] is None:
            document["config"] = {}
        document.setdefault("history", [])
        document.pop("labkernel.cache.v0", None)  # of that image alone (remotecache.py)
        return cls(document, list(image.layers), hidden=list(hidden), mounts=list(mounts))


class Outcome(msgspec.Struct):
    """How a step went."""

    cached: bool
    why: str = ""
    layer: LayerInfo | None = None
    size_bytes: int | None = None


@dataclass
class Settings:
    """What holds for a whole build. `ssh`: id -> socket of an agent; `extra_hosts`: name:address."""

    build_args: Mapping[str, str]
    no_cache: bool
    network: str
    epoch_s: int | None
    escape: str
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    ssh: Mapping[str, str] = field(default_factory=dict)
    allow: frozenset[str] = frozenset()
    extra_hosts: Sequence[str] = ()
    memory_bytes: int = 0
    limits: Mapping[str, Any] = field(default_factory=dict)


class StageBuilder:
    """Carries out the instructions of one stage on its State."""

    def __init__(
        self,
        state: State,
        *,
        settings: Settings,
        cache: BuildCache,
        maker: LayerMaker,
        context: Context,
        globals_: Mapping[str, str],
        platform: Mapping[str, str],
        source_of: Callable[[str], Sequence[LayerInfo]],
        warn: Callable[[str], None],
        layout: Layout,
        running: Running,
        later: Later,
    ) -> None:
        """`source_of` gives the layers of what `--from` names (a stage or an image)."""
        self.state = state
        self.settings = settings
        self._cache = cache
        self.maker = maker
        self.context = context
        self._globals = globals_
        self._platform = platform
        self.source_of = source_of
        self.warn = warn
        self.layout = layout
        self._running = running
        self.later = later
        self._lexer = Lexer(settings.escape)
        self._rebuilt = ""  # the last step of this stage that was made anew
        self._reset = ""  # the last one of those that change the config only

    def carry_out(self, step: ins.Instruction, on_output: Callable[[bytes], None]) -> Outcome:
        """Do one instruction. Raises LabkernelError, RunEnded; the state is then as it was before."""
        if isinstance(step, ins.Run):
            return self._run(step, on_output)
        if isinstance(step, ins.Copy | ins.Add):
            return self._transfer(step)
        if isinstance(step, ins.Workdir):
            return self._workdir(step)
        before = copy.deepcopy(self.state.config)
        message = self._configure(step)
        return self._remember_config(step, message, before)

    # -- words -------------------------------------------------------------------------------------------------

    def expand(self, word: str) -> str:
        """A word with the stage's variables replaced."""
        return self._lexer.process(word, self.state.variables()).result

    def _words(self, words: Sequence[str]) -> list[str]:
        variables = self.state.variables()
        return [found for word in words for found in self._lexer.process(word, variables).words]

    # -- instructions that change the config --------------------------------------------------------------------

    def _configure(self, step: ins.Instruction) -> str:
        """Change the config; returns the words of the history."""
        config = self.state.config
        if isinstance(step, ins.Env):
            pairs = [(self.expand(name), self.expand(value)) for name, value in step.pairs]
            environment = self.state.environment
            for name, value in pairs:
                environment[name] = value
                if name in self.state.args:
                    self.state.args[name] = value
            config["Env"] = [f"{name}={value}" for name, value in environment.items()]
            return "ENV " + " ".join(f"{name}={value}" for name, value in pairs)
        if isinstance(step, ins.Label):
            labels = {self.expand(name): self.expand(value) for name, value in step.pairs}
            config["Labels"] = {**(config.get("Labels") or {}), **labels}
            return "LABEL " + " ".join(f"{name}={value}" for name, value in labels.items())
        if isinstance(step, ins.Arg):
            return self._arg(step)
        if isinstance(step, ins.Cmd | ins.Entrypoint):
            return self._command(step)
        return self._configure_more(step, config)

    def _configure_more(self, step: ins.Instruction, config: dict[str, Any]) -> str:
        if isinstance(step, ins.User):
            config["User"] = self.expand(step.user)
            return f"USER {config['User']}"
        if isinstance(step, ins.Expose):
            ports = [port for word in self._words(step.ports) for port in parse_port(word)]
            config["ExposedPorts"] = {**(config.get("ExposedPorts") or {}), **{port: {} for port in ports}}
            return f"EXPOSE [{' '.join(sorted(ports))}]"
        if isinstance(step, ins.Volume):
            paths = self._words(step.paths) if not step.text.rstrip().endswith("]") else [*map(self.expand, step.paths)]
            if any(not path for path in paths):
                raise BuildError("VOLUME specified can not be an empty string")
            config["Volumes"] = {**(config.get("Volumes") or {}), **{path: {} for path in paths}}
            return f"VOLUME [{' '.join(paths)}]"
        if isinstance(step, ins.Stopsignal):
            from ..runtime.settings import parse_signal

            config["StopSignal"] = self.expand(step.signal)
            parse_signal(config["StopSignal"])
            return f"STOPSIGNAL {config['StopSignal']}"
        if isinstance(step, ins.Shell):
            config["Shell"] = list(step.shell)
            return f"SHELL [{' '.join(step.shell)}]"
        if isinstance(step, ins.Healthcheck):
            config["Healthcheck"] = _healthcheck(step)
            return f"HEALTHCHECK {json.dumps(config['Healthcheck'])}"
        if isinstance(step, ins.Onbuild):
            config["OnBuild"] = [*(config.get("OnBuild") or []), step.expression]
            return f"ONBUILD {step.expression}"
        if isinstance(step, ins.Maintainer):
            self.state.document["author"] = step.maintainer
            return f"MAINTAINER {step.maintainer}"
        raise BuildError(f"{step.name} is not supported yet", line=step.line, end_line=step.end_line)

    def _arg(self, step: ins.Arg) -> str:
        words = []
        for raw_name, default in step.pairs:
            name = self.expand(raw_name)
            value = self.settings.build_args.get(name)
            if value is None and default is not None:
                value = self.expand(default)
            elif value is None:
                value = self._globals.get(name, self._platform.get(name))
            if value is not None or name not in self.state.args:
                self.state.args[name] = value
            words.append(name if value is None else f"{name}={value}")
        return "ARG " + " ".join(words)

    def _command(self, step: ins.Cmd | ins.Entrypoint) -> str:
        config = self.state.config
        # Without an argument too the shell form is a call of the shell; `[]` is what takes a command away.
        words = list(step.args) if step.json_form else [*self._shell(), " ".join(step.args)]
        key = "Cmd" if isinstance(step, ins.Cmd) else "Entrypoint"
        config[key] = words or None
        if not words:
            config.pop(key)
        if key == "Cmd":
            self.state.command_set = True
        elif not self.state.command_set:
            config.pop("Cmd", None)  # a command of the base image belongs to the base image's entry point
        return f"{key.upper()} {_quoted(words)}"

    def _shell(self) -> list[str]:
        return list(self.state.config.get("Shell") or DEFAULT_SHELL)

    def _remember_config(self, step: ins.Instruction, message: str, before: dict[str, Any]) -> Outcome:
        document = self.state.document
        parent = digest_of(before, document.get("history"), self.state.chain)
        key = digest_of("config", 1, parent, message, self.state.config, document.get("author"), self.settings.epoch_s)
        found = None if self.settings.no_cache else self._cache.find(key)
        created = found.created if found else self._now()
        why = ""
        if found is None:
            place = digest_of("config", self.state.chain, step.name)
            why = self._why(place, {"what is before it": parent}, message, self._rebuilt or self._reset)
            record = {"created": created, "text": message, "place": place, "inputs": {"what is before it": parent}}
            self._cache.store(key, None, record)
            self._reset = shortened(message)
        if not isinstance(step, ins.Onbuild):  # as BuildKit has it: a trigger leaves its trace where it is carried out
            self._add_history(message, created, empty=True)
        return Outcome(cached=found is not None, why=why)

    def _why(self, place: str, inputs: Mapping[str, str], text: str, earlier: str) -> str:
        """Why a step is not cached; `earlier`: the step before it that was not."""
        if self.settings.no_cache:
            return "--no-cache"
        return f"follows {earlier}, which was made anew" if earlier else self._cache.why(place, inputs, text)

    # -- instructions that make layers --------------------------------------------------------------------------

    def _workdir(self, step: ins.Workdir) -> Outcome:
        wanted = self.expand(step.path)
        path = posixpath.normpath(posixpath.join("/", self.state.config.get("WorkingDir") or "/", wanted))
        path = "/" + path.lstrip("/")
        before = copy.deepcopy(self.state.config)
        self.state.config["WorkingDir"] = path
        message = f"WORKDIR {path}"
        if path == "/":
            return self._remember_config(step, message, before)
        user = self.state.config.get("User") or ""
        operation = {"do": "mkdir", "path": path, "owner": user, "mtime_ns": self.mtime_ns()}
        try:
            return self._layer(
                message,
                text=f"WORKDIR {path}",
                inputs={"user": user},
                make=lambda: self.maker.place(
                    self.state.layers, [operation], later=self.later, clamp_s=self.settings.epoch_s
                ),
            )
        except BaseException:
            self.state.document["config"] = before
            raise

    def _run(self, step: ins.Run, on_output: Callable[[bytes], None]) -> Outcome:
        sandbox = self._sandbox(step)
        argv, files, shown = self._command_of(step)
        variables = {**self._proxies(), **self.state.arguments}
        environment = [f"{name}={value}" for name, value in variables.items()]
        config = self.state.config
        plan = self._mounts(step)
        # Proxies that no ARG declares are no part of the history, nor of the cache.
        visible = {name: value or "" for name, value in self.state.args.items()}
        prefix = f"|{len(visible)} {' '.join(f'{k}={v}' for k, v in visible.items())} " if visible else ""
        inputs = {f"ARG {name}": value for name, value in self.state.arguments.items()}
        inputs |= {f"ENV {name}": value for name, value in self.state.environment.items()}
        inputs |= {"USER": config.get("User") or "", "WORKDIR": config.get("WorkingDir") or ""}
        inputs |= {"network": sandbox.network, "argv": digest_of(argv, {k: v.decode() for k, v in files.items()})}
        inputs |= {"security": "insecure"} if sandbox.insecure else {}
        inputs |= {"--device": " ".join(device.name for device in sandbox.devices)} if step.devices else {}
        inputs |= {"--add-host": " ".join(sandbox.extra_hosts)} if sandbox.extra_hosts else {}
        inputs |= plan.inputs

        def make() -> tuple[LayerInfo, int, list[str]]:
            return self.maker.run(
                self.state.layers,
                argv=argv,
                config=config,
                environment=environment,
                sandbox=sandbox,
                files=files,
                attach=lambda directory, stack: attach(
                    plan, directory, self.layout, stack, stopped=self._running.stopped
                ),
                fds=self.context.descriptors() if plan.mounts else [],
                running=self._running,
                on_output=on_output,
                later=self.later,
                clamp_s=self.settings.epoch_s,
            )

        return self._layer(f"RUN {prefix}{shown} # labkernel", text=f"RUN {shown}", inputs=inputs, make=make)

    def _sandbox(self, step: ins.Run) -> Sandbox:
        insecure = step.security == "insecure"
        if insecure and "security.insecure" not in self.settings.allow:
            raise BuildError(
                "security.insecure is not allowed", resolution="allow it to this build: --allow security.insecure"
            )
        if step.network == "host" and not {self.settings.network, *self.settings.allow} & {"host", "network.host"}:
            raise BuildError(
                "network.host is not allowed",
                resolution="allow it to this build: --allow network.host, or give --network=host to the build itself",
            )
        devices: tuple[Device, ...] = ()
        if step.devices:
            self.context.trace.repeatable = False  # descriptions and nodes have to be looked at again
            devices = granted_devices(step.devices, self.settings.allow, self.warn)
        return Sandbox(
            devices=devices,
            architecture=str(self.state.document.get("architecture") or ""),
            network=step.network if step.network != "default" else self.settings.network,
            insecure=insecure,
            extra_hosts=tuple(self.settings.extra_hosts),
            memory_bytes=self.settings.memory_bytes,
            limits=self.settings.limits,
            hostname=self.settings.build_args.get("BUILDKIT_SANDBOX_HOSTNAME") or Sandbox.hostname,
            host_masks=tuple(self.state.hidden),
            host_mounts=tuple(self.state.mounts),
        )

    def _mounts(self, step: ins.Run) -> RunMounts:
        def find_source(source: str, origin: str | None) -> tuple[Any, list[dict[str, Any]]]:
            if origin is None:
                extra = self.context.select_extra([source]) if source.strip("/.") else []
                return (1, extra) if extra else (0, self.context.select(step, [source], None))
            layers = self.source_of(origin)
            return self.maker.directories(layers), scan_stage(self, step.name, origin, layers, [source])

        return plan_mounts(
            step.mounts(self.expand),
            workdir=self.state.config.get("WorkingDir") or "/",
            find_source=find_source,
            secrets=self.settings.secrets,
            ssh=self.settings.ssh,
            namespace=self.settings.build_args.get("BUILDKIT_CACHE_MOUNT_NS", ""),
        )

    def _proxies(self) -> dict[str, str]:
        """The proxies given to the build, under both of their names, where no ENV has one."""
        given = {
            name.lower(): self.settings.build_args[name] for name in PROXY_ARGS if name in self.settings.build_args
        }
        environment = self.state.environment
        both = {name: value for low, value in given.items() for name in (low.upper(), low)}
        return {name: value for name, value in both.items() if name not in environment}

    def _command_of(self, step: ins.Run) -> tuple[list[str], dict[str, bytes], str]:
        """(argv, files the command needs, how the history shows it)."""
        if step.json_form:
            return list(step.args), {}, " ".join(step.args)
        line = step.args[0] if step.args else ""
        files: dict[str, bytes] = {}
        alone = _sole_heredoc(line) if len(step.heredocs) == 1 else None
        if alone is not None:
            body = step.heredocs[0].text
            if body.startswith("#!"):
                path = f"/dev/pipes/{alone.name}"
                files[path] = body.encode("utf-8", "surrogateescape")
                line = path
            else:
                line = body
        elif step.heredocs:
            line += "".join(f"\n{doc.content}{doc.name}" for doc in step.heredocs)
        argv = [*self._shell(), line]
        shown = " ".join([*self._shell(), step.heredocs[0].text if files else line]).rstrip("\n")
        return argv, files, shown

    def _transfer(self, step: ins.Copy | ins.Add) -> Outcome:
        with ExitStack() as stack:
            plan = plan_transfer(step, self, stack)
            return self._layer(
                plan.message,
                text=plan.text,
                inputs=plan.inputs,
                make=plan.make,
                linked=plan.linked,
                details=plan.details,
            )

    # -- layers and history ---------------------------------------------------------------------------------------

    def _layer(
        self,
        message: str,
        *,
        text: str,
        inputs: Mapping[str, str],
        make: Callable[[], tuple[LayerInfo, int, list[str]]],
        linked: bool = False,
        details: Callable[[], dict[str, str]] = dict,
    ) -> Outcome:
        """The layer of a step from the cache, or made by `make`; added to the state with its history.

        A `linked` layer (COPY --link) is the same whatever is below it. `details`: see `LayerPlan`."""
        name = text.split(" ", 1)[0]
        parent = self.state.chain
        key = digest_of("layer", 3, "" if linked else parent, text, sorted(inputs.items()), self.settings.epoch_s)
        found = None if self.settings.no_cache else self._cache.find(key)
        if found is not None and found.layer is not None:
            self._append(found.layer, message, found.created)
            return Outcome(cached=True, layer=found.layer, size_bytes=int(found.record.get("size_bytes", 0)))
        place = digest_of("layer", parent, name)
        inputs = {**inputs, **details()}
        why = self._why(place, inputs, text, self._rebuilt)
        layer, size_bytes, warnings = make()
        for warning in warnings:
            self.warn(f"{text.splitlines()[0]}: {warning}")
        created = self._now()
        record = {"created": created, "text": text, "place": place, "inputs": inputs, "size_bytes": size_bytes}
        self.later(lambda: self._cache.store(key, layer, record))
        self._append(layer, message, created)
        self._rebuilt = shortened(text)
        return Outcome(cached=False, why=why, layer=layer, size_bytes=size_bytes)

    def _append(self, layer: LayerInfo, message: str, created: str) -> None:
        self.state.layers.append(layer)
        self._add_history(message, created, empty=False)

    def _add_history(self, message: str, created: str, *, empty: bool) -> None:
        entry: dict[str, Any] = {"created": created, "created_by": message, "comment": COMMENT}
        if empty:
            entry["empty_layer"] = True
        self.state.document["history"] = [*(self.state.document.get("history") or []), entry]
        self.state.document["created"] = created

    def _now(self) -> str:
        return timestamp(self.settings.epoch_s)

    def mtime_ns(self) -> int | None:
        """The time of files that a step makes itself, None for now."""
        return None if self.settings.epoch_s is None else self.settings.epoch_s * 1_000_000_000


def _sole_heredoc(line: str) -> Heredoc | None:
    return parse_heredoc(line.strip()) if line.strip().count("<<") == 1 and " " not in line.strip() else None


def _quoted(words: Sequence[str]) -> str:
    """As BuildKit words a list in the history."""
    return "[" + " ".join(json.dumps(word, ensure_ascii=False) for word in words) + "]"


def _healthcheck(step: ins.Healthcheck) -> dict[str, Any]:
    fields = {
        "Interval": step.interval_ns,
        "Timeout": step.timeout_ns,
        "StartPeriod": step.start_period_ns,
        "StartInterval": step.start_interval_ns,
        "Retries": step.retries,
    }
    return {"Test": list(step.test), **{name: value for name, value in fields.items() if value}}
