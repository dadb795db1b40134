"""Sources from elsewhere: URLs and git repositories for ADD, and contexts that are no directory of this machine.

Downloads are kept below the store with their ETag, so that an unchanged one is not fetched again. git is the machine's
own program. Source: Dockerfile reference, ADD; Docker documentation, "Build context" (URL fragments); RFC 9110.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from ..errors import BuildError, UsageError
from ..store.blobs import temporary_directory
from .mounts import download_directory

if TYPE_CHECKING:
    from ..store.layout import Layout

_SCP = re.compile(r"[A-Za-z0-9_.-]+@[A-Za-z0-9.-]+:.+")
_CHECKSUM = re.compile(r"sha256:[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_TIMEOUT_S = 30.0
_CHUNK = 1 << 20


class Download(NamedTuple):
    """A file fetched by ADD: where it lies, the name it should have, its digest (sha256:…)."""

    path: Path
    name: str
    digest: str


class GitSource(Struct, frozen=True):
    """A git URL in docker's form: `remote#ref:subdirectory` or `remote?ref=…&subdir=…`. `checksum` is the commit it has
    to be; `keep_git` None: not said."""

    remote: str
    ref: str = ""
    subdirectory: str = ""
    checksum: str = ""
    keep_git: bool | None = None
    submodules: bool = True


def is_remote(source: str) -> bool:
    """Whether ADD fetches this source."""
    return is_url(source) or is_git(source)


def is_url(source: str) -> bool:
    return source.startswith(("http://", "https://")) and not is_git(source)


def is_git(source: str) -> bool:
    """Whether docker takes this for a git repository: git://, ssh://, user@host:path, or an URL of `….git`."""
    address = re.split(r"[?#]", source, maxsplit=1)[0]
    if address.startswith(("http://", "https://", "file://")):
        return address.endswith(".git")
    return address.startswith(("git://", "ssh://")) or bool(_SCP.fullmatch(address))


def parse_git(source: str) -> GitSource:
    """Take a git URL apart. Raises UsageError for a query that docker does not know, for what contradicts itself, and
    for a ref that git would take for an option."""
    address, _, fragment = source.partition("#")
    remote, _, query = address.partition("?")
    ref, _, subdirectory = fragment.partition(":")
    found = GitSource(remote, ref, subdirectory)
    if query:
        found = _with_query(found, query)
    for word in (found.remote, found.ref, found.checksum):
        if word.startswith("-"):
            raise UsageError(f"invalid git reference: {source}")
    return replace(found, subdirectory=posixpath.normpath(f"/{found.subdirectory}").strip("/"))


def _with_query(found: GitSource, query: str) -> GitSource:
    from urllib.parse import parse_qsl

    given: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in ("ref", "tag", "branch", "subdir", "checksum", "commit", "keep-git-dir", "submodules"):
            raise UsageError(
                f'unexpected query "{name}" in the git URL', resolution="ref, tag, branch, subdir, checksum"
            )
        if name in given:
            raise UsageError(f'query "{name}" of the git URL has multiple values')
        if not value and name not in ("keep-git-dir", "submodules"):
            raise UsageError(f'query "{name}" of the git URL has no value')
        given[name] = value
    refs = [found.ref, given.get("ref", "")]
    for name, prefix in (("tag", "refs/tags/"), ("branch", "refs/heads/")):
        if name in given:
            refs.append(prefix + given[name].removeprefix(prefix))
    checksum = given.get("commit", given.get("checksum", ""))
    return replace(
        found,
        ref=_one_of("ref", refs) or checksum,
        subdirectory=_one_of("subdir", [found.subdirectory, given.get("subdir", "")]),
        checksum=checksum,
        keep_git=_switch(given, "keep-git-dir"),
        submodules=_switch(given, "submodules") is not False,
    )


def _one_of(name: str, values: Sequence[str]) -> str:
    """The value that is said, once or more often."""
    said = list(dict.fromkeys(value for value in values if value))
    if len(said) > 1:
        raise UsageError(f'{name} of the git URL conflicts: "{said[0]}" vs "{said[1]}"')
    return said[0] if said else ""


def _switch(given: Mapping[str, str], name: str) -> bool | None:
    if name not in given:
        return None
    if given[name].lower() not in ("", "1", "t", "true", "0", "f", "false"):
        raise UsageError(f'invalid {name} value in the git URL: "{given[name]}"', resolution="true or false")
    return given[name].lower() in ("", "1", "t", "true")


# -- git -------------------------------------------------------------------------------------------------------------


def clone(
    source: str,
    target: Path,
    *,
    keep_git: bool | None = None,
    commit: str | None = None,
    told: Callable[[int], None] | None = None,
) -> Path:
    """Check `source` out below the empty directory `target`; returns the directory that is meant. With `commit` (7
    digits or more) it has to be that one. Both may stand in `source` too, and must not contradict it. `told` is called
    with the moment of the commit, in seconds since 1970.

    Effects: runs git, which may use the network and the user's own credentials. Raises BuildError.
    """
    if shutil.which("git") is None:
        raise BuildError(
            f"{source} is a git repository, and there is no git on this machine",
            resolution="install git, or clone it elsewhere and use the directory",
        )
    wanted = parse_git(source)
    if None not in (keep_git, wanted.keep_git) and keep_git != wanted.keep_git:
        raise BuildError("inconsistent keep-git-dir configuration", resolution=f"{source} says another thing")
    if commit and wanted.checksum and commit != wanted.checksum:
        raise BuildError(f'checksum mismatch "{commit}" != "{wanted.checksum}"')
    commit = commit or wanted.checksum or None
    work = target / "work"
    _git("init", "--quiet", str(work))
    ref = wanted.ref or "HEAD"
    try:
        _git("fetch", "--quiet", "--depth=1", "--", wanted.remote, ref, cwd=work)
        _git("checkout", "--quiet", "--detach", "FETCH_HEAD", cwd=work)
    except BuildError:
        if not _COMMIT.fullmatch(ref) and not re.fullmatch(r"[0-9a-f]{7,}", ref):
            raise
        # Not every server gives a commit away by its name: then all of the history is needed.
        _git("fetch", "--quiet", "--tags", "--", wanted.remote, "+refs/heads/*:refs/remotes/origin/*", cwd=work)
        _git("checkout", "--quiet", "--detach", ref, "--", cwd=work)
    found_commit = _git("rev-parse", "HEAD", cwd=work)
    if commit is not None and not (re.fullmatch(r"[0-9a-f]{7,64}", commit) and found_commit.startswith(commit)):
        raise BuildError(
            f"expected checksum to match {commit}, got {found_commit}",
            resolution=f"what {source} gives is not what --checksum says",
        )
    if told is not None:
        told(int(_git("show", "--no-patch", "--format=%ct", "HEAD", cwd=work)))
    if wanted.submodules and (work / ".gitmodules").exists():
        _git("submodule", "--quiet", "update", "--init", "--recursive", "--depth=1", cwd=work)
    if not (keep_git or wanted.keep_git):
        shutil.rmtree(work / ".git", ignore_errors=True)
    found = Path(os.path.realpath(work / wanted.subdirectory))
    if not found.is_dir() or not found.is_relative_to(work.resolve()):
        raise BuildError(f"{source}: there is no directory {wanted.subdirectory} in this repository")
    return found


def _git(*words: str, cwd: Path | None = None) -> str:
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1", "LC_ALL": "C"}
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        environment.pop(name, None)
    options = ["-c", "core.autocrlf=false", "-c", "advice.detachedHead=false", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *options, *words], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise BuildError(
            f"git {words[0]} failed: {said[-1] if said else f'status {done.returncode}'}",
            details="\n".join(said[-10:]) or None,
            resolution="the part after # is a branch, a tag or a commit, then :SUBDIRECTORY",
        )
    return done.stdout.decode(errors="replace").strip()


# -- URLs ------------------------------------------------------------------------------------------------------------


def download(url: str, layout: Layout, *, checksum: str | None) -> Download:
    """The file at `url`, from the store when it is still the same. Raises BuildError; nothing half fetched stays."""
    if checksum is not None and not _CHECKSUM.fullmatch(checksum):
        raise BuildError(
            f"unsupported checksum for ADD: {checksum}", resolution="--checksum=sha256:<64 hexadecimal digits>"
        )
    place = download_directory(layout, url)
    about = _read_about(place)
    if checksum is None or about.get("digest") != checksum:
        about = _fetch(url, place, about)
    if checksum is not None and about["digest"] != checksum:
        raise BuildError(
            f"digest mismatch {about['digest']}: {checksum}",
            resolution=f"what {url} gives is not what --checksum says",
        )
    return Download(place / about["file"], about["name"], about["digest"])


def _read_about(place: Path) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads((place / "about.json").read_bytes())
        return about if (place / about["file"]).is_file() else {}
    except (OSError, ValueError, KeyError):
        return {}


def _fetch(url: str, place: Path, known: dict[str, Any]) -> dict[str, Any]:
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    headers = {"User-Agent": "labkernel", "Accept-Encoding": "identity"}
    if known.get("etag"):
        headers["If-None-Match"] = known["etag"]
    try:
        with urlopen(Request(url, headers=headers), timeout=_TIMEOUT_S) as answer:
            return _keep(url, place, answer)
    except HTTPError as err:
        if err.code == 304:
            return known
        raise BuildError(
            f"invalid response status {err.code}", resolution=f"ADD {url}: is the address right?"
        ) from None
    except (OSError, HTTPException, ValueError) as err:
        reason = getattr(err, "reason", None) or err
        raise BuildError(
            f"failed to load {url}: {reason}", resolution="is the server within reach of this machine?"
        ) from None


def _keep(url: str, place: Path, answer: Any) -> dict[str, Any]:
    import email.utils

    new = place / f"new-{secrets.token_hex(6)}"
    sha = hashlib.sha256()
    size = 0
    try:
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            while data := answer.read(_CHUNK):
                sha.update(data)
                size += len(data)
                file.write(data)
        length = answer.headers.get("Content-Length")
        if length is not None and length.isdigit() and int(length) != size:
            raise BuildError(f"failed to load {url}: it ended after {size} of {length} bytes")
        modified = email.utils.parsedate_tz(answer.headers.get("Last-Modified") or "")
        seconds = email.utils.mktime_tz(modified) if modified else 0
        os.utime(new, (seconds, seconds))
        name = answer.headers.get_filename() or posixpath.basename(url.partition("?")[0].partition("#")[0].rstrip("/"))
        about = {
            "id": url,
            "etag": answer.headers.get("ETag"),
            "digest": f"sha256:{sha.hexdigest()}",
            "name": posixpath.basename(name.replace("\\", "/")) or "download",
            "file": sha.hexdigest(),
        }
        os.replace(new, place / about["file"])
    finally:
        new.unlink(missing_ok=True)
    written = place / f"about-{secrets.token_hex(6)}"
    written.write_text(json.dumps(about))
    os.replace(written, place / "about.json")
    return about


# -- contexts --------------------------------------------------------------------------------------------------------


@contextmanager
def git_context(
    layout: Layout, source: str, *, keep_git: bool | None = None, told: Callable[[int], None] | None = None
) -> Iterator[Path]:
    """A checked out repository as a build context, while the block runs; `told`: see `clone`. Raises BuildError."""
    with temporary_directory(layout, "context") as base:
        yield clone(source, base, keep_git=keep_git, told=told)


@contextmanager
def url_context(layout: Layout, url: str, told: Callable[[int], None]) -> Iterator[Path | bytes]:
    """What a server has, as `stream_context`; `told` the moment it says, or that of the newest member of an archive."""
    path = download(url, layout, checksum=None).path
    modified = int(path.stat().st_mtime)  # 0 where the server does not say
    if modified:
        told(modified)
    with path.open("rb") as file, stream_context(layout, file, told=None if modified else told) as found:
        yield found


@contextmanager
def stream_context(
    layout: Layout, stream: BinaryIO, *, told: Callable[[int], None] | None = None
) -> Iterator[Path | bytes]:
    """`build -`: the directory of a tar (plain or compressed) while the block runs, or the bytes of a Dockerfile.

    `told` is called with the time of the newest member, in seconds since 1970."""
    from ..oci.extract import Extractor
    from ..oci.rootfd import Root
    from ..oci.tarstream import BlobStream, is_tar, members

    with temporary_directory(layout, "context") as base:
        with open(base / "input", "w+b") as file:
            shutil.copyfileobj(stream, file, _CHUNK)
            file.flush()
            if not is_tar(file.fileno()):
                file.seek(0)
                yield file.read()
                return
            target = base / "tree"
            target.mkdir()
            with Root.open(str(target)) as root:
                # As our own: COPY gives owners anew, and a plain user could not give files away.
                out = Extractor(root, whiteouts=False, owner=(os.geteuid(), os.getegid()))
                data = BlobStream(file.fileno(), max_bytes=1 << 40)
                newest = 0
                for member in members(data, max_members=5_000_000):
                    newest = max(newest, int(member.mtime))
                    out.add(member, data)
                data.finish()
                out.finish()
        (base / "input").unlink()
        if told is not None and newest:
            told(newest)
        yield target
