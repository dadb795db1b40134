"""The notebook's host of the commands: `%container`, `%docker`, `%vm`, `%lab`, `%compare` and `%%dockerfile`.

A magic parses its line with the same grammar as the terminal and returns what the command returns, so that
`c = %container run -d web` works. Parsing and meaning are in `commands/`; words around them (variables, comments,
completion, help) in `commands/cells.py`. Nothing is opened before the first command needs it.

What IPython would do and we do not: its variable expansion is off, since docker lines are full of `$` and `{{}}`.
`{name}`, `{name.attribute}` and `$name` are replaced outside single quotes when `name` is a variable of the notebook;
everything else stays. A container, image or volume stands for its name or id, a list for its items.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from IPython.core.magic import needs_local_scope, no_var_expand

from .commands.cells import HelpLines, ShowDiscarded, command_matcher, expand, split
from .commands.grammar import LabGroup, invoke
from .commands.host import Host, Progress
from .commands.tree import CONTAINER_ROOT, LAB_ROOT, ROOT
from .display import no_formulas
from .errors import LabkernelError

if TYPE_CHECKING:
    import click
    from IPython.core.interactiveshell import InteractiveShell

    from .engine import Engine

MAGICS = ("container", "docker", "network", "vm", "lab", "compare", "registry", "daemon", "compose", "context")
_STATE = "_labkernel"


class NotebookHost(Host):
    """Writes to the cell's streams; there is no stdin and no terminal, but most front ends ask for a line."""

    notebook = True

    def __init__(self, open_engine: Callable[[], Engine], prog: str, told: set[str] | None = None) -> None:
        super().__init__(open_engine, prog)
        self._told = set() if told is None else told
        self._decoders: dict[str, codecs.IncrementalDecoder] = {}

    def write(self, stream: str, data: bytes) -> None:
        # A character may be split between two reads; what is no UTF-8 shows as U+FFFD.
        if stream not in self._decoders:
            self._decoders[stream] = codecs.getincrementaldecoder("utf-8")("replace")
        self._print(stream, self._decoders[stream].decode(data))

    def end_of_output(self) -> None:
        for stream, decoder in self._decoders.items():
            self._print(stream, decoder.decode(b"", final=True))
        self._decoders.clear()

    def _print(self, stream: str, text: str) -> None:
        if text:
            target = sys.stderr if stream == "stderr" else sys.stdout
            target.write(text)
            target.flush()

    def line(self, text: str = "") -> None:
        self._print("stdout", f"{text}\n")

    def warn(self, text: str) -> None:
        # On stdout: nbgrader gives no points to a test cell that wrote to stderr.
        self._print("stdout", f"WARNING: {text}\n")

    def note(self, text: str) -> None:
        self.line(text)

    def warn_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.warn(text)

    def error(self, err: LabkernelError) -> None:
        self._print("stdout", "\n".join(err.render()) + "\n")

    def can_ask(self) -> bool:
        from IPython.core.getipython import get_ipython

        kernel = getattr(get_ipython(), "kernel", None)
        # refused where a notebook is executed without anybody there (nbconvert, nbgrader)
        return bool(kernel is not None and kernel._allow_stdin)

    def ask(self, prompt: str) -> str | None:
        try:
            return input(prompt)
        except EOFError:
            return None

    @contextmanager
    def live(self) -> Iterator[Callable[[str, str | None], None]]:
        from IPython.display import display

        handle: Any = None

        def redraw(text: str, html: str | None) -> None:
            nonlocal handle
            bundle = {"text/plain": text, **({"text/html": no_formulas(html)} if html else {})}
            if handle is None:
                handle = display(bundle, raw=True, display_id=True)  # type: ignore[no-untyped-call]
            else:
                handle.update(bundle, raw=True)

        yield redraw

    def build_progress(self, dockerfile: str, *, mode: str) -> Progress:
        from .widgets.progress import BuildProgress, terminal_progress

        return terminal_progress(sys.stdout, "plain") if mode == "plain" else BuildProgress(dockerfile)


class Lab:
    """`lab` in a notebook: the engine, opened when something of it is first asked for."""

    def __init__(self) -> None:
        self._engine: Engine | None = None
        self._context = ""

    def _open(self) -> Engine:
        from .contexts import Contexts, open_engine

        current = Contexts().current()
        if self._engine is None or current != self._context:
            self._engine, self._context = open_engine(current), current
        return self._engine

    def __getattr__(self, name: str) -> Any:
        # IPython and debuggers look for special names on every object; that must not open a store.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._open(), name)

    def __dir__(self) -> list[str]:
        from .engine import Engine

        return sorted({*(name for name in dir(Engine) if not name.startswith("_")), "layout", "driver"})

    def __repr__(self) -> str:
        return repr(self._engine) if self._engine is not None else "<labkernel lab: opens when it is first used>"


class Extension:
    """What `%load_ext labkernel` put into one shell, so that `%unload_ext` can take it out again."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self.lab = Lab()
        self.told: set[str] = set()
        self.last_compose = ""
        self.help_lines = HelpLines(MAGICS, _children)
        self.discarded = ShowDiscarded(MAGICS)
        self.matcher = command_matcher(_ROOTS, lambda prog: NotebookHost(self.lab._open, prog))

    def line_magic(self, name: str, root: click.Command) -> Callable[..., Any]:
        @no_var_expand
        @needs_local_scope
        def magic(line: str, local_ns: Mapping[str, Any] | None = None) -> Any:
            return self.run(root, f"%{name}", line, local_ns)

        magic.__name__ = name
        magic.__qualname__ = name
        magic.__doc__ = _doc(f"%{name}")
        return magic

    def run(self, root: click.Command, prog: str, line: str, local_ns: Mapping[str, Any] | None, **meta: str) -> Any:
        """One line of a magic: variables, words, command. A `;` at the end keeps its value from being shown."""
        names = {**self.shell.user_ns, **(local_ns or {})}
        argv, silent = split(expand(line, names))
        host = NotebookHost(self.lab._open, prog, self.told)
        value = invoke(root, argv, host, prog, meta={f"labkernel.{key}": text for key, text in meta.items()})
        return None if silent else value

    def dockerfile(self) -> Callable[..., Any]:
        @no_var_expand
        @needs_local_scope
        def dockerfile(line: str, cell: str, local_ns: Mapping[str, Any] | None = None) -> Any:
            from .commands.build import cell as command

            return self.run(command, "%%dockerfile", line, local_ns, cell=cell)

        dockerfile.__doc__ = _doc("%%dockerfile")
        return dockerfile

    def compose(self) -> Callable[..., Any]:
        @no_var_expand
        @needs_local_scope
        def compose(line: str, cell: str | None = None, local_ns: Mapping[str, Any] | None = None) -> Any:
            from .commands.compose import cell as command
            from .commands.compose import compose as group

            if cell is None:
                return self.run(group, "%compose", line, local_ns, last_cell=self.last_compose)
            self.last_compose = cell
            return self.run(command, "%%compose", line, local_ns, cell=cell)

        compose.__doc__ = _doc("%%compose")
        return compose

    def load(self) -> None:
        manager = self.shell.magics_manager
        for name in MAGICS:
            manager.register_function(self.line_magic(name, _root(name)), "line", name)
        manager.register_function(self.compose(), "line_cell", "compose")
        manager.register_function(self.dockerfile(), "cell", "dockerfile")
        self.shell.input_transformers_cleanup.append(self.help_lines)
        self.shell.ast_transformers.append(self.discarded)
        completer = getattr(self.shell, "Completer", None)
        if completer is not None:
            completer.custom_matchers.append(self.matcher)
        self.shell.user_ns.setdefault("lab", self.lab)
        self.shell.user_ns_hidden.setdefault("lab", self.lab)

    def unload(self) -> None:
        for name in MAGICS:
            self.shell.magics_manager.magics["line"].pop(name, None)
        for name in ("dockerfile", "compose"):
            self.shell.magics_manager.magics["cell"].pop(name, None)
        _drop(self.shell.input_transformers_cleanup, self.help_lines)
        _drop(self.shell.ast_transformers, self.discarded)
        completer = getattr(self.shell, "Completer", None)
        if completer is not None:
            _drop(completer.custom_matchers, self.matcher)
        if self.shell.user_ns.get("lab") is self.lab:
            del self.shell.user_ns["lab"]


def register(shell: InteractiveShell) -> None:
    """Put the magics, completion, help and `lab` into a shell (once)."""
    if getattr(shell, _STATE, None) is None:
        extension = Extension(shell)
        extension.load()
        setattr(shell, _STATE, extension)


def unregister(shell: InteractiveShell) -> None:
    """Take out what `register` put in; containers go on."""
    extension: Extension | None = getattr(shell, _STATE, None)
    if extension is not None:
        extension.unload()
        setattr(shell, _STATE, None)


_ROOTS: dict[str, LabGroup | str] = {
    "container": CONTAINER_ROOT,
    "docker": ROOT,
    "lab": LAB_ROOT,
    # Imported when they are first used: a group of its own, and a single command.
    "vm": "vm",
    "compare": "compare",
    "network": "network",
    "registry": "registry",
    "daemon": "daemon",
    "compose": "compose",
    "context": "context",
}


def _root(name: str) -> click.Command:
    """The command a magic's words are for. `%compare` and `%vm` are what they are below `labkernel`."""
    found = _ROOTS[name]
    return _Deferred(found) if isinstance(found, str) else found


def _Deferred(name: str) -> Any:  # noqa: N802  (reads as the class it stands in for)
    """A command of the tree that is imported when it is used, so that loading the extension stays light."""

    class Deferred:
        def __getattr__(self, attribute: str) -> Any:
            import click

            command = ROOT.get_command(click.Context(ROOT), name)
            assert command is not None
            return getattr(command, attribute)

    return Deferred()


def _children(name: str, words: list[str]) -> bool:
    """Whether `words` after `%name` are all names of commands (so that `%container run?` asks for help)."""
    import click

    command: Any = _root(name)
    context = click.Context(ROOT)
    for word in words:
        command = command.get_command(context, word) if hasattr(command, "get_command") else None
        if command is None:
            return False
    return True


def _drop(things: list[Any], thing: Any) -> None:
    if thing in things:
        things.remove(thing)


def _doc(prog: str) -> str:
    """What `%container?` shows."""
    brief = {
        "%container": "Containers and images: `%container run --rm IMAGE CMD`, `%container ps -a`, …",
        "%docker": "Any docker command line, on the embedded engine: `%docker ps -a`.",
        "%vm": "The same images as virtual machines: `%vm run IMAGE CMD`.",
        "%lab": "The lab: `%lab doctor`, `%lab info`, `%lab check`.",
        "%compare": "A command as a container and as a virtual machine: `%compare IMAGE -- CMD`.",
        "%network": "Networks of containers: `%network create web`, `%network ls`.",
        "%registry": "The private registry of this machine: `%registry start`, `%registry stop`.",
        "%daemon": "The Docker Engine API, for `!docker` and SDKs: `%daemon start`, `%daemon stop`, `%daemon status`.",
        "%compose": "Services of a Compose file: `%compose ps`, `%compose logs`, … of the last cell or a file here.",
        "%context": "Which engine the magics are for: `%context use ssh://USER@HOST`, `%context use embedded`.",
        "%%compose": "Services together; the cell is the Compose file: `%%compose up -d`.",
        "%%dockerfile": "Build an image; the cell is the Dockerfile: `%%dockerfile -t NAME`.",
    }[prog]
    return f"{brief}\n\nAll commands and flags: `{prog} --help`; of one command: `%container run?`."


__all__ = ["MAGICS", "Lab", "NotebookHost", "register", "unregister"]
