"""What each unpacked layer adds, changes and removes: a walk over overlay lower directories, bottom first.

Tasks for the worker, which may read files of every owner. Nothing is mounted: whiteouts and opaque directories are
applied to a tree of names in memory. Left out: what a layer's step was, and how any of it is shown.

Source: OCI image-spec layer.md, "Representing Changes"; kernel Documentation filesystems/overlayfs.rst.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

from ..linux.ownfiles import close_own, open_own, own_parent
from .pack import check_depth, is_opaque, is_whiteout, raise_limits

_KINDS = {
    stat.S_IFREG: "f",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
    stat.S_IFIFO: "p",
}
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def kind_of(status: os.stat_result) -> str | None:
    """A letter for what an image can hold; None for sockets."""
    return _KINDS.get(stat.S_IFMT(status.st_mode))


class Node:
    """A name of the merged tree. `layer` is the index of the layer it is from, `size` counts for regular files."""

    __slots__ = ("attributes", "children", "kind", "layer", "size", "stamp")

    def __init__(
        self, kind: str, size: int, layer: int, attributes: tuple[int, int, int], stamp: tuple[int, int] = (0, 0)
    ) -> None:
        self.kind = kind
        self.size = size
        self.layer = layer
        self.attributes = attributes  # mode, uid, gid
        self.stamp = stamp  # size and time (ns) as the file system has them
        self.children: dict[str, Node] = {}

    def walk(self, path: str) -> Iterator[tuple[str, Node]]:
        """This name and all below it."""
        waiting = [(path, self)]
        while waiting:
            where, node = waiting.pop()
            yield where, node
            waiting += [(f"{where}/{name}", child) for name, child in node.children.items()]


class Scan:
    """The merged tree so far; `layer` puts one more on top."""

    def __init__(self) -> None:
        self.root = Node("d", 0, -1, (0, 0, 0))
        self.wasted: dict[int, int] = {}
        self.wasted_paths: dict[str, int] = {}
        self._index = -1
        self._entries: list[list[Any]] = []
        self._inodes: set[tuple[int, int]] = set()
        self._opened_up: dict[int, int] = {}

    def layer(self, directory: str) -> list[list[Any]]:
        """Entries [path, "added" | "changed" | "removed", kind letter, size, size before] of one more layer."""
        self._index += 1
        self._entries = []
        self._inodes = set()
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._directory(fd, "", self.root)
        finally:
            os.close(fd)
        return self._entries

    def _directory(self, fd: int, path: str, node: Node) -> None:
        check_depth(path.count("/"))
        if is_opaque(fd):
            for name in list(node.children):
                if node.children[name].layer != self._index:
                    self._remove(node, name, f"{path}/{name}")
        for name in sorted(os.listdir(fd)):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            where = f"{path}/{name}"
            if is_whiteout(status):
                if name in node.children:
                    self._remove(node, name, where)
                continue
            kind = kind_of(status)
            if kind is None:
                continue
            child = self._entry(node, name, where, kind, status)
            if kind == "d":
                inside = open_own(name, _FLAGS | os.O_DIRECTORY, fd, self._opened_up)
                try:
                    self._directory(inside, where, child)
                finally:
                    close_own(inside, self._opened_up)

    def _entry(self, parent: Node, name: str, path: str, kind: str, status: os.stat_result) -> Node:
        attributes = (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid)
        before = parent.children.get(name)
        size = self._size(status) if kind == "f" else 0
        if before is not None and before.kind == kind == "d":
            # A directory stands in a layer for what is below it; it is a change of its own only with other attributes.
            if before.attributes != attributes:
                self._entries.append([path, "changed", "d", 0, 0])
            before.attributes = attributes
            return before
        if before is not None and before.kind == "d":
            self._remove(parent, name, path)
            before = None
        node = parent.children[name] = Node(kind, size, self._index, attributes, (status.st_size, status.st_mtime_ns))
        if before is None:
            self._entries.append([path, "added", kind, size, 0])
        else:
            self._hide(path, before)
            self._entries.append([path, "changed", kind, size, before.size])
        return node

    def _remove(self, parent: Node, name: str, path: str) -> None:
        node = parent.children.pop(name)
        total = 0
        for where, below in node.walk(path):
            total += below.size
            self._hide(where, below)
        self._entries.append([path, "removed", node.kind, 0, total])

    def _hide(self, path: str, node: Node) -> None:
        if node.size:
            self.wasted[node.layer] = self.wasted.get(node.layer, 0) + node.size
            self.wasted_paths[path] = self.wasted_paths.get(path, 0) + node.size

    def _size(self, status: os.stat_result) -> int:
        if status.st_nlink > 1:
            inode = (status.st_dev, status.st_ino)
            if inode in self._inodes:
                return 0
            self._inodes.add(inode)
        return status.st_size


def scan_layers(
    *, directories: Sequence[str], most: int = 2000, userxattr: bool = False, single_id: bool = False
) -> dict[str, Any]:
    """What each of the layer directories (bottom first) does to those below it.

    Returns {"layers": [{"added", "changed", "removed" (counts), "size_bytes" (of its files), "wasted_bytes" (of them,
    hidden by layers above), "entries" (see `Scan.layer`; the `most` telling ones, by path)}], "wasted" ([path, bytes],
    the worst 50 first), "size_bytes" (of what is visible in the end)}.
    """
    raise_limits()
    scan = Scan()
    layers: list[dict[str, Any]] = []
    for directory in directories:
        entries = scan.layer(directory)
        counts = {word: sum(entry[1] == word for entry in entries) for word in ("added", "changed", "removed")}
        size = sum(entry[3] for entry in entries)
        # What is changed or removed tells more than what is new, and large more than small.
        kept = sorted(entries, key=lambda entry: (entry[1] == "added", -max(entry[3], entry[4]), entry[0]))[:most]
        layers.append({**counts, "size_bytes": size, "entries": sorted(kept)})
    for index, layer in enumerate(layers):
        layer["wasted_bytes"] = scan.wasted.get(index, 0)
    worst = sorted(scan.wasted_paths.items(), key=lambda pair: (-pair[1], pair[0]))[:50]
    visible = sum(node.size for _, node in scan.root.walk(""))
    return {"layers": layers, "wasted": [list(pair) for pair in worst], "size_bytes": visible}


def compare_trees(
    *,
    first: Sequence[str],
    second: Sequence[str],
    most: int = 5000,
    userxattr: bool = False,
    single_id: bool = False,
) -> dict[str, Any]:
    """How the merged tree of `second` (directories, bottom first) differs from that of `first`.

    Returns {"entries": [path, "added" | "changed" | "removed", kind, size, size before] by path, "left_out"}. Files of
    one layer are the same; of others, when type, mode, owner and bytes are. Times do not count.
    """
    raise_limits()
    sides = []
    for directories in (first, second):
        scan = Scan()
        for directory in directories:
            scan.layer(directory)
        sides.append({path: node for path, node in scan.root.walk("") if path})
    before, after = sides
    entries: list[list[Any]] = []
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if old is None and new is not None:
            entries.append([path, "added", new.kind, new.size, 0])
        elif new is None and old is not None:
            entries.append([path, "removed", old.kind, 0, old.size])
        elif old is not None and new is not None:
            same = (old.kind, old.size, old.attributes) == (new.kind, new.size, new.attributes)
            places = first[old.layer], second[new.layer]
            if not same or (old.kind in "fl" and places[0] != places[1] and not _equal(path, old.kind, *places)):
                entries.append([path, "changed", new.kind, new.size, old.size])
    return {"entries": entries[:most], "left_out": max(0, len(entries) - most)}


def _equal(path: str, kind: str, first: str, second: str) -> bool:
    found: list[str | bytes] = []
    for directory in (first, second):
        with own_parent(directory, path) as (parent, name):
            if kind == "l":
                found.append(os.readlink(name, dir_fd=parent))
                continue
            with open(open_own(name, _FLAGS, parent), "rb", buffering=0) as file:
                found.append(hashlib.file_digest(file, "sha256").digest())
    return found[0] == found[1]
