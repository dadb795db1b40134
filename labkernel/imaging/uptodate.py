"""Whether `labkernel pull NAME` would find everything as it is, told without loading engine and command line.

A pull of what is there is one question to the registry (a HEAD: which digest has the tag now?) and a look at the store;
Python needs twenty times as long to load what a real pull needs. So `find` asks and looks with the standard library's
lightest modules, for the plainest case: a tag at a registry on this machine (plain HTTP), no settings about registries,
no flags but --quiet. Whatever is not so, or not as expected, is left to the pull itself: `find` decides nothing else.
"""

from __future__ import annotations

import os

from ..store.places import find_root

TYPE_CHECKING = False  # typing itself takes 8 ms to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_TIMEOUT_S = 2.0
_ANSWER_MAX = 16384
_PATH = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-/")
_TAG = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
_ACCEPTED = (
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, "
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json"
)
_MACHINES = {"x86_64": b"amd64", "aarch64": b"arm64"}


def find(words: Sequence[str]) -> list[str] | None:
    """The lines that `labkernel pull WORDS…` would print when the image is up to date; None: pull."""
    flags = [word for word in words if word.startswith("-")]
    names = [word for word in words if not word.startswith("-")]
    if len(names) != 1 or any(flag not in ("-q", "--quiet") for flag in flags) or _has_settings():
        return None
    domain, slash, rest = names[0].partition("/")
    path, colon, tag = rest.partition(":")
    host, _, port = domain.partition(":")
    if not slash or not path or not set(path) <= _PATH or not set(tag) <= _TAG or (colon and not tag):
        return None
    if not (host == "localhost" or (host.startswith("127.") and host.replace(".", "").isdigit())):
        return None
    tag = tag or "latest"
    try:
        known = _stored(f"{domain}/{path}", tag)
        digest = _ask(host, int(port or 80), domain, f"/v2/{path}/manifests/{tag}") if known else None
    except (OSError, ValueError):
        return None
    if digest is None or digest not in known:
        return None
    name = f"{domain}/{path}:{tag}"
    if flags:
        return [name]
    lines = [] if colon else ["Using default tag: latest"]
    lines += [f"{tag}: Pulling from {path}", f"Digest: {digest}", f"Status: Image is up to date for {name}", name]
    return lines


def _has_settings() -> bool:
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return "LABKERNEL_REGISTRIES" in os.environ or os.path.exists(f"{base}/labkernel/registries.toml")


def _stored(name: str, tag: str) -> set[str]:
    """Digests that the stored image of this name is known under; empty unless all of it is here, for this machine."""
    import _sqlite3 as sqlite3  # the package around it takes 6 ms to import, for conversions not needed here

    root = find_root()
    if not os.path.exists(f"{root}/labkernel.db"):
        return set()
    try:
        db = sqlite3.connect(f"{root}/labkernel.db", timeout=1.0, isolation_level=None)
        try:
            found = db.execute(
                "SELECT id, manifest FROM images WHERE deleted_at IS NULL AND id = "
                "(SELECT image_id FROM tags WHERE name = ?)",
                (f"{name}:{tag}",),
            ).fetchone()
            if found is None:
                return set()
            layers = db.execute("SELECT diff_id, digest FROM image_layers WHERE image_id = ?", found[:1]).fetchall()
            names = db.execute("SELECT name FROM repo_digests WHERE image_id = ?", found[:1]).fetchall()
        finally:
            db.close()
    except sqlite3.Error:
        return set()
    blobs = [*found, *(digest for _, digest in layers)]
    if not all(os.path.exists(f"{root}/blobs/{digest.replace(':', '/', 1)}") for digest in blobs):
        return set()
    if not all(os.path.isdir(f"{root}/layers/{diff_id.rpartition(':')[2]}") for diff_id, _ in layers):
        return set()
    return (
        {each.rpartition("@")[2] for (each,) in names if each.startswith(f"{name}@")} if _fits(root, found) else set()
    )


def _fits(root: str, found: Any) -> bool:
    machine = _MACHINES.get(os.uname().machine)
    with open(f"{root}/blobs/{found[0].replace(':', '/', 1)}", "rb") as file:
        config = file.read(8 << 20).replace(b'": "', b'":"')
    return machine is not None and b'"architecture":"' + machine + b'"' in config and b'"variant"' not in config


def _ask(host: str, port: int, domain: str, path: str) -> str | None:
    """The digest in the answer to a HEAD; None for any other answer than a plain good one."""
    import _socket  # `socket` takes 2 ms to import

    sock = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    try:
        sock.settimeout(_TIMEOUT_S)
        sock.connect((host, port))
        request = f"HEAD {path} HTTP/1.1\r\nHost: {domain}\r\nAccept: {_ACCEPTED}\r\nUser-Agent: labkernel\r\n"
        sock.sendall(f"{request}Connection: close\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < _ANSWER_MAX:
            more = sock.recv(4096)
            if not more:
                return None
            answer += more
    finally:
        sock.close()
    first, *headers = answer.decode("latin-1").partition("\r\n\r\n")[0].split("\r\n")
    if first.split(" ")[1:2] != ["200"]:
        return None
    found = [line.partition(":")[2].strip() for line in headers if line.lower().startswith("docker-content-digest:")]
    return found[0] if len(found) == 1 else None
