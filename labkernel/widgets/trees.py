"""`lab.processes()` and `lab.network_map()`: who is whose child, and who can talk to whom, as pictures that stay.

Both are plain HTML or SVG without a script: a saved notebook shows them, and so does a page without a kernel.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..display import human_memory, no_formulas, without_formulas
from ..errors import LabkernelError, NoSuchContainer, NoSuchVM, UsageError

_MONO = "font-family:var(--jp-code-font-family, monospace);font-size:12px"
_HELPERS = {"labkernel-work": "worker", "labkernel-dns": "names", "labkernel-ports": "published ports"}
_VM = " (VM)"  # after a name: it is a virtual machine
_MUTED = "color:var(--jp-ui-font-color2, #666)"


@dataclass
class Process:
    """One process with its children. `inside` is its pid as its own pid namespace has it (proc(5), NSpid)."""

    pid: int
    inside: int
    command: str
    memory_bytes: int
    cpu_s: float
    label: str = ""
    name: str = ""
    children: list[Process] = field(default_factory=list)

    @property
    def count(self) -> int:
        return 1 + sum(child.count for child in self.children)


@dataclass(repr=False)
class ProcessTree:
    """Trees of processes as this machine sees them; shows itself."""

    title: str
    roots: list[Process]

    def _lines(self) -> list[str]:
        lines: list[str] = []

        def walk(process: Process, stem: str, mark: str) -> None:
            lines.append(f"{stem}{mark}{_words(process)}")
            below = stem + {"": "", "├─ ": "│  ", "└─ ": "   "}[mark]
            for index, child in enumerate(process.children):
                walk(child, below, "└─ " if index == len(process.children) - 1 else "├─ ")

        for root in self.roots:
            walk(root, "", "")
        return lines

    def __repr__(self) -> str:
        return "\n".join([self.title, *(self._lines() or ["nothing runs"])])

    @without_formulas
    def _repr_html_(self) -> str:
        body = "".join(_branch(root) for root in self.roots) or "<p>nothing runs</p>"
        count = sum(root.count for root in self.roots)
        many = "1 process" if count == 1 else f"{count} processes"
        head = f"<div><b>{html.escape(self.title)}</b> <span style='{_MUTED}'>{many}</span></div>"
        return f"<div class='labkernel-processes'>{head}{body}</div>"


def _words(process: Process) -> str:
    inside = f" (inside {process.inside})" if process.inside != process.pid else ""
    label = f"[{process.label}] " if process.label else ""
    figures = f"{human_memory(process.memory_bytes)}, {process.cpu_s:.2f} s"
    return f"{label}{process.pid}{inside} {_cut(process.command, 90)}  {figures}"


def _branch(process: Process) -> str:
    inside = f" <span style='{_MUTED}'>inside: {process.inside}</span>" if process.inside != process.pid else ""
    label = (
        f"<b style='color:var(--jp-brand-color1, #0072b2)'>{html.escape(process.label)}</b> " if process.label else ""
    )
    figures = f"<span style='{_MUTED}'>{human_memory(process.memory_bytes)}, {process.cpu_s:.2f} s of CPU</span>"
    command = html.escape(_cut(process.command, 90))
    line = f"{label}<span style='{_MUTED}'>{process.pid}</span>{inside} {command} &nbsp;{figures}"
    border = "border-left:1px solid var(--jp-border-color2, #ccc)"
    place = f"<div style='margin-left:8px;padding-left:10px;{border}'>"
    below = "".join(f"{place}{_branch(child)}</div>" for child in process.children)
    if not below:
        return f"<div style='{_MONO};padding:1px 0'>{line}</div>"
    return f"<details open><summary style='cursor:pointer;{_MONO};padding:1px 0'>{line}</summary>{below}</details>"


def processes(engine: Any, thing: Any = None) -> ProcessTree:
    """The processes of a container or VM (or its name); without one, those of the engine: keeper, supervisor and all
    that runs below them. Raises NoSuchContainer, UsageError for something that has no processes."""
    if isinstance(thing, str):
        thing = _find(engine, thing)
    if thing is None:
        labels: dict[int, str] = {}
        for container in engine.containers.list():
            if pid := int((container.runtime_state() or {}).get("pid") or 0):
                labels[pid] = container.name
        labels |= {vm.pid: f"{vm.name}{_VM}" for vm in engine.vms.list() if vm.pid}
        return ProcessTree("the engine and what it runs", [_own_tree(engine, labels)])
    kind = getattr(thing, "kind", "")
    state = thing.runtime_state() if callable(getattr(thing, "runtime_state", None)) and kind != "vm" else {}
    main: int | None = int(state.get("pid") or 0) if state else getattr(thing, "pid", None)
    if not isinstance(main, int) and kind != "vm":
        raise UsageError(f"has no processes: {thing!r}", resolution="give it a container, a VM, or a name")
    name = str(getattr(thing, "name", main))
    found = [_tree(main, {main: name})] if main else []
    return ProcessTree(f"processes of {name}", [root for root in found if root.command])


def _find(engine: Any, name: str) -> Any:
    """The container of this name or, where there is none, the virtual machine."""
    try:
        return engine.containers.get(name)
    except NoSuchContainer:
        try:
            return engine.vms.get(name)
        except NoSuchVM:
            pass
        raise


def _own_tree(engine: Any, labels: dict[int, str]) -> Process:
    """The keeper and all below it, each called what it is (docs/architecture.md, Processes)."""
    info = engine.runtime.ensure()
    names = {info.keeper_pid: "keeper", info.pid: "supervisor", **labels}
    root = _tree(int(info.keeper_pid or info.pid), names)
    for supervisor in (root, *root.children):
        for child in supervisor.children if supervisor.label == "supervisor" else ():
            # What a container's process is called before it becomes one: a child that waits, in namespaces of its own.
            waits = "waiting for a container" if child.inside != child.pid else _HELPERS.get(child.name, "helper")
            watches = any(below.label.endswith(_VM) for below in child.children)
            child.label = child.label or ("monitor of a machine" if watches else waits)
    return root


def _tree(pid: int, labels: dict[int, str]) -> Process:
    """The process and its children, read with psutil; what ends meanwhile is left out."""
    import psutil

    try:
        one = psutil.Process(pid)
        with one.oneshot():
            # Without the padding of a process that has given itself a shorter name.
            command = " ".join(" ".join(one.cmdline()).split()) or f"[{one.name()}]"
            name, times, memory = one.name(), one.cpu_times(), one.memory_info().rss
        children = [_tree(child.pid, labels) for child in one.children()]
    except psutil.Error:
        return Process(pid, pid, "", 0, 0.0)
    cpu = times.user + times.system
    alive = [child for child in children if child.command]
    return Process(pid, _inside(pid), command, memory, cpu, labels.get(pid, ""), name, alive)


def _inside(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status") as stream:
            return next(int(line.split()[-1]) for line in stream if line.startswith("NSpid:"))
    except (OSError, StopIteration, ValueError):
        return pid


# -- networks

_WIDTH, _ROW, _TOP = 900, 46, 54
_IN_A_ROW, _SMALL_ROW, _MOST_DRAWN = 3, 30, 60  # of a network with more members than _EACH_ITS_BOX
_EACH_ITS_BOX = 8
_MACHINES = "qemu"  # stands for a driver: the networks of virtual machines, one for each
_INK, _SOFT, _LINE = "#1b1f24", "#57606a", "#8b949e"
_COLOURS = ("#0072B2", "#009E73", "#B3589A", "#9A6700", "#2B8CBE", "#555555")


@dataclass(frozen=True)
class Member:
    """A container or machine in a network: its address there, and the ports that are published on this machine."""

    name: str
    address: str
    ports: str = ""


@dataclass(frozen=True)
class Net:
    name: str
    driver: str
    subnet: str
    members: tuple[Member, ...]


@dataclass(frozen=True, repr=False)
class NetworkMap:
    """Networks and who is in them. Two containers or machines can talk when they share a network that is not `none`; a
    machine with `--network bridge` is alone in the user-mode network of its QEMU."""

    nets: Sequence[Net]

    def __repr__(self) -> str:
        lines = []
        for net in self.nets:
            lines.append(f"{net.name} ({', '.join(filter(None, (net.driver, net.subnet)))})")
            lines += [f"  {m.name}  {m.address}{f'  published: {m.ports}' if m.ports else ''}" for m in net.members]
            lines += [] if net.members else ["  (nobody)"]
        return "\n".join(lines) or "no networks"

    def svg(self) -> str:
        """The map: this machine at the left, its networks, their containers at the right."""
        heights = [_height(net) for net in self.nets]
        height = _TOP + sum(heights) + 10
        parts = [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {height}' width='{_WIDTH}' "
            f"height='{height}' font-family='system-ui, sans-serif' font-size='13'>",
            f"<rect width='{_WIDTH}' height='{height}' rx='8' fill='#ffffff'/>",
            f"<text x='20' y='30' font-size='15' font-weight='600' fill='{_INK}'>Networks of this engine</text>",
        ]
        middle = _TOP + sum(heights) / 2
        parts.append(_box(20, middle - 26, 120, 52, "this machine", "", _INK, filled=False))
        top = float(_TOP)
        for index, (net, tall) in enumerate(zip(self.nets, heights, strict=True)):
            parts.append(_net_svg(net, _COLOURS[index % len(_COLOURS)], top, tall - 16, middle))
            top += tall
        return "".join([*parts, "</svg>"])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        # As an image in HTML it shrinks with its cell; on its own JupyterLab cuts it off.
        data = base64.b64encode(self.svg().encode()).decode()
        picture = f"<img style='max-width:100%' alt='map of the networks' src='data:image/svg+xml;base64,{data}'>"
        return {"text/html": no_formulas(picture), "image/svg+xml": self.svg(), "text/plain": repr(self)}


def _box(x: float, y: float, w: float, h: float, name: str, below: str, colour: str, *, filled: bool) -> str:
    ink = "#ffffff" if filled else _INK
    shift = 0 if not below else -8
    words = (
        f"<text x='{x + w / 2}' y='{y + h / 2 + 5 + shift}' text-anchor='middle' font-weight='600' fill='{ink}'>"
        f"{html.escape(_cut(name))}</text>"
    )
    if below:
        words += (
            f"<text x='{x + w / 2}' y='{y + h / 2 + 14}' text-anchor='middle' font-size='11' "
            f"fill='{ink if filled else _SOFT}'>{html.escape(_cut(below, 34))}</text>"
        )
    fill = colour if filled else "#ffffff"
    place = f"x='{x}' y='{y}' width='{w}' height='{h}' rx='7'"
    return f"<rect {place} fill='{fill}' stroke='{colour}' stroke-width='1.6'/>{words}"


def _cut(text: str, length: int = 21) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _net_svg(net: Net, colour: str, top: float, tall: float, machine_y: float) -> str:
    y = top + tall / 2
    parts = []
    if net.driver != "null":
        dash = "" if net.driver != "host" else " stroke-dasharray='5 4'"
        parts.append(f"<path d='M140 {machine_y} C 190 {machine_y}, 190 {y}, 240 {y}' fill='none' "
                     f"stroke='{_LINE}' stroke-width='1.6'{dash}/>")  # fmt: skip
    what = {"null": "loopback only", "host": "the machine's own", _MACHINES: "each in a network of its own"}
    parts.append(
        _box(240, y - 23, 200, 46, net.name, net.subnet or what.get(net.driver, net.driver), colour, filled=True)
    )
    if not net.members:
        parts.append(f"<text x='560' y='{y + 4}' fill='{_SOFT}'>nobody</text>")
    if len(net.members) > _EACH_ITS_BOX:
        return "".join([*parts, _crowd_svg(net, colour, top, tall)])
    for place, member in enumerate(net.members):
        at = top + tall * (place + 0.5) / len(net.members)
        line = f"M440 {y} C 490 {y}, 500 {at}, 550 {at}"
        parts.append(f"<path d='{line}' fill='none' stroke='{colour}' stroke-width='1.6'/>")
        parts.append(_box(550, at - 19, 180, 38, member.name, member.address, colour, filled=False))
        if member.ports:
            ports = html.escape(_cut(member.ports.replace("/tcp", ""), 21))
            parts.append(f"<text x='740' y='{at + 4}' font-size='11' fill='{_SOFT}'>{ports}</text>")
    return "".join(parts)


def _height(net: Net) -> int:
    if len(net.members) <= _EACH_ITS_BOX:
        return max(1, len(net.members)) * _ROW + 26
    rows = -(-min(len(net.members), _MOST_DRAWN) // _IN_A_ROW) + (len(net.members) > _MOST_DRAWN)
    return rows * _SMALL_ROW + 12 + 26


def _crowd_svg(net: Net, colour: str, top: float, tall: float) -> str:
    """Many members in one frame, three in a row; two hundred boxes with a line each make a picture ten screens high."""
    left, width = 500, _WIDTH - 500 - 16
    y, column = top + tall / 2, width / _IN_A_ROW
    parts = [
        f"<path d='M440 {y} L {left} {y}' stroke='{colour}' stroke-width='1.6'/>"
        f"<rect x='{left}' y='{top}' width='{width}' height='{tall}' rx='7' fill='none' stroke='{colour}' "
        "stroke-width='1.6'/>"
    ]
    for place, member in enumerate(net.members[:_MOST_DRAWN]):
        x, line = left + 10 + column * (place % _IN_A_ROW), top + 6 + _SMALL_ROW * (place // _IN_A_ROW)
        below = " ".join(filter(None, (member.address, member.ports.replace("/tcp", ""))))
        parts.append(
            f"<text x='{x}' y='{line + 13}' font-size='12' font-weight='600' fill='{_INK}'>"
            f"{html.escape(_cut(member.name, 17))}</text>"
            f"<text x='{x}' y='{line + 25}' font-size='10' fill='{_SOFT}'>{html.escape(_cut(below, 22))}</text>"
        )
    if len(net.members) > _MOST_DRAWN:
        words = f"and {len(net.members) - _MOST_DRAWN} more"
        parts.append(f"<text x='{left + 10}' y='{top + tall - 14}' font-size='12' fill='{_SOFT}'>{words}</text>")
    return "".join(parts)


def network_map(engine: Any) -> NetworkMap:
    """All networks of an engine and the running containers and machines in them, with addresses and published ports."""
    containers = {container.id: container for container in engine.containers.list()}
    machines = list(engine.vms.list())
    wired = {vm.id: vm for vm in machines if vm.wired}
    machines = [vm for vm in machines if not vm.wired]
    nets = []
    for network in engine.networks.list():
        attrs = network.attrs
        subnets = [str(entry.get("Subnet", "")) for entry in (attrs.get("IPAM") or {}).get("Config") or ()]
        members = []
        for id, entry in (attrs.get("Containers") or {}).items():
            found = containers.get(id) or wired.get(id)
            ports = _published(found) if found is not None else ""
            address = str(entry.get("IPv4Address") or "").partition("/")[0]
            name = str(entry.get("Name") or id[:12]) + (_VM if id in wired else "")
            members.append(Member(name, address, ports))
        driver = str(attrs.get("Driver") or "")
        if driver in ("host", "null"):
            mode = {"host": "host", "null": "none"}[driver]
            named = {member.name for member in members}
            members += [
                Member(container.name, "")
                for container in containers.values()
                if container.name not in named and (container.attrs["HostConfig"].get("NetworkMode") == mode)
            ]
        if driver == "null":
            members += [Member(f"{vm.name}{_VM}", "") for vm in machines if not _address(vm)]
        closed = ["internal"] if attrs.get("Internal") else []
        nets.append(Net(network.name, driver, ", ".join([*filter(None, subnets), *closed]), tuple(members)))
    linked = tuple(Member(f"{vm.name}{_VM}", _address(vm), _published(vm)) for vm in machines if _address(vm))
    return NetworkMap([*nets, Net("virtual machines", _MACHINES, "", linked)] if linked else nets)


def _address(vm: Any) -> str:
    """The machine's address, and whether it gets out: published ports alone open no way for it (QEMU's restrict)."""
    address = str((vm.attrs.get("NetworkSettings") or {}).get("IPAddress") or "")
    return f"{address}, no way out" if address and vm.network_mode == "none" else address


def _published(container: Any) -> str:
    try:
        ports = (container.attrs.get("NetworkSettings") or {}).get("Ports") or {}
    except (LabkernelError, OSError):
        return ""
    found = [f"{place.get('HostPort')}→{inside}" for inside, places in ports.items() for place in places or ()]
    return ", ".join(dict.fromkeys(found))
