"""Who may import whom, as data (docs/architecture.md draws the same), read from the code with `ast`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "labkernel"

LEAVES = {"errors", "display"}
MECHANISMS = {"oci", "dockerfile", "runtime", "net", "qemu", "store"}
SERVICES = {
    # a service, and the room of its parts
    *("images", "registries", "imaging"),
    *("builds", "building"),
    *("containers", "volumes", "events", "consistency", "running"),
    *("networks", "networking"),
    *("vms", "machines"),
    *("metrics", "comparisons", "measuring"),
    # several containers together
    "compose",
    # engines elsewhere
    *("contexts", "remote"),
}
FACES = {"magics", "cli", "terminal", "kernel", "commands", "widgets", "api", "grading"}

# Forked for every container or kept for every store: only the standard library, `linux` and `errors`.
# The supervisor loads `net` by name (runtime/networking.py), when a container has a network.
LIGHT = (
    "linux/",
    "runtime/keeper",
    "runtime/supervisor",
    "runtime/init",
    "runtime/entering",
    "runtime/pool",
    "runtime/protocol",
    "net/",
)
# Compiling a seccomp filter is a service's work; only the bytes reach the supervisor.
LIGHT_EXCEPTIONS = {"linux/seccomp.py": {"pyseccomp"}}


BELOW = {
    **{room: {"errors"} for room in LEAVES},
    "linux": {"linux", *LEAVES},
    **{room: {room, "linux", *LEAVES} for room in MECHANISMS},
    **{room: {*SERVICES, *MECHANISMS, "linux", *LEAVES} for room in SERVICES},
    # `lab.monitor(c)` is how a notebook asks for the widget: the engine's one look upward, at the time of the call.
    "engine": {*SERVICES, *MECHANISMS, "linux", *LEAVES, "widgets"},
    **{room: {"engine", *SERVICES, *LEAVES, room} for room in FACES},
}
BELOW["api"] |= {"runtime", "dockerfile", "store"}
BELOW["commands"] |= {"api", "widgets", "dockerfile", "linux", "runtime"}
BELOW["terminal"] |= {"commands", "widgets"}
# Which engine it is to be is asked before there is one.
BELOW["contexts"] |= {"engine"}
BELOW["cli"] |= {"terminal", "widgets"}
BELOW["magics"] |= {"commands", "widgets"}
BELOW["kernel"] |= {"magics"}


def imports_of(path: Path) -> set[str]:
    """Absolute names of the modules a file imports, wherever in the file, except for type checking."""
    package = ["labkernel", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            skipped.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found.update({f"{name}.{alias.name}" for alias in node.names} if name == "labkernel" else {name})
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_what_its_room_may(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    assert room in BELOW, f"labkernel/{room} has no place in the house: give it one here and in the architecture page"
    ours = {name.split(".")[1] for name in imports_of(path) if name.startswith("labkernel.")} - {"__version__"}
    assert ours <= BELOW[room], f"{relative} imports {sorted(ours - BELOW[room])}"


@pytest.mark.parametrize("path", [p for p in FILES if str(p.relative_to(PACKAGE)).startswith(LIGHT)], ids=str)
def test_light_modules_need_only_the_standard_library(path: Path) -> None:
    relative = str(path.relative_to(PACKAGE))
    foreign = {
        name.split(".")[0]
        for name in imports_of(path)
        if not name.startswith("labkernel") and name.split(".")[0] not in sys.stdlib_module_names
    }
    assert foreign <= LIGHT_EXCEPTIONS.get(relative, set()), f"{relative} imports {sorted(foreign)}"
    ours = {name for name in imports_of(path) if name.startswith("labkernel.")}
    assert all(name.split(".")[1] in {"linux", "errors", "runtime", "net"} for name in ours), (
        f"{relative} imports {sorted(ours)}"
    )


HEAVY = ("matplotlib", "pandas", "numpy", "httpx2", "tornado", "ipywidgets", "anywidget", "IPython", "jupyter_client")


def test_import_labkernel_loads_nothing_heavy() -> None:
    code = "import sys, labkernel, labkernel.engine; print(*[m for m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name in HEAVY]
