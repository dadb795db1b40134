"""Where a build takes from and gives to: --parents, URLs, git, contexts on stdin, caches that travel, --output."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from building import build, output
from registries import serving

from labkernel.building.context import Context
from labkernel.building.remotecache import CachePlace
from labkernel.building.result import BuildStep
from labkernel.building.sources import GitSource, is_git, parse_git
from labkernel.engine import Engine
from labkernel.errors import BuildError, StoreError, UsageError
from labkernel.store.locks import is_locked

BASE = "FROM lab/busybox\n"
Cli = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context"
    (path / "a/b/c").mkdir(parents=True)
    (path / "a/b").chmod(0o700)
    for name in ("a/one.txt", "a/b/two.txt", "a/b/c/three.txt", "a/b/c/four.log"):
        (path / name).write_text(name)
    return path


@pytest.fixture
def cli(engine: Engine, tmp_path: Path) -> Cli:
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "MINE": "from the environment",
    }

    def run(*words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
        settings = {"input": b"", "capture_output": True, "timeout": 120, "env": env, "cwd": tmp_path, "check": False}
        return subprocess.run([sys.executable, "-m", "labkernel.cli", *words], **{**settings, **more})

    return run


# -- COPY ------------------------------------------------------------------------------------------------------------


def test_parents(engine: Engine, context: Path) -> None:
    text = BASE + (
        "COPY --parents a/b/c/*.txt a/one.txt /p/\nCOPY --parents ./a/./b/**/*.txt /q/\n"
        "FROM lab/busybox\nCOPY --from=0 --parents /p/./a/b/c /r/\nCOPY --parents a/b /s/\nCOPY --from=0 /p /p\n"
        "COPY --from=0 /q /q\n"
    )
    result = build(engine, text, context=context)
    assert output(engine, result.image, "cd / && find p q r s -type f | sort").split() == [
        "p/a/b/c/three.txt",
        "p/a/one.txt",
        "q/b/c/three.txt",
        "q/b/two.txt",
        "r/a/b/c/three.txt",
        "s/a/b/c/four.log",
        "s/a/b/c/three.txt",
        "s/a/b/two.txt",
    ]
    assert output(engine, result.image, "stat -c %a /p/a/b /q/b /r/a/b /s/a/b /p/a").split() == ["700"] * 4 + ["755"]


def test_exclude(engine: Engine, context: Path) -> None:
    text = (
        "FROM lab/busybox AS from\nCOPY a /a\nFROM lab/busybox\n"
        "COPY --from=from --exclude=**/*.log --exclude=b/t* /a /x\nCOPY --exclude=four* a/b/c/* /y/\n"
    )
    result = build(engine, text, context=context)
    found = output(engine, result.image, "cd / && find x y -type f | sort").split()
    assert found == ["x/b/c/three.txt", "x/one.txt", "y/three.txt"]


def test_link_is_found_again_over_another_base(engine: Engine, context: Path) -> None:
    mark = os.urandom(8).hex()
    (context / "a/one.txt").write_text(mark)
    text = BASE + "{}COPY --link a/one.txt /linked/\n"
    build(engine, text.format(""), context=context)
    again = build(engine, text.format(f"RUN echo {mark} > /other\n"), context=context)
    assert again.steps[-1].cached
    assert output(engine, again.image, "cat /linked/one.txt /other") == f"{mark}{mark}\n"


# -- ADD -------------------------------------------------------------------------------------------------------------


class Server(http.server.SimpleHTTPRequestHandler):
    files: dict[str, bytes] = {}
    asked: list[tuple[str, int]] = []

    def do_GET(self) -> None:
        data = self.files.get(self.path.partition("?")[0])
        tag = hashlib.sha256(data or b"").hexdigest()
        code = 404 if data is None else 304 if self.headers.get("If-None-Match") == tag else 200
        self.asked.append((self.path, code))
        self.send_response(code)
        self.send_header("ETag", tag)
        if code == 200 and data is not None:
            self.send_header("Last-Modified", "Tue, 14 Nov 2023 22:13:20 GMT")
            self.send_header("Content-Length", str(len(data) + (5 if "short" in self.path else 0)))
        self.end_headers()
        if code == 200 and data is not None:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.files, Server.asked = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


@pytest.mark.usefixtures("many_ids")
def test_add_of_urls(engine: Engine, server: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry = tarfile.TarInfo("inside")
        tar.addfile(entry, io.BytesIO())
    Server.files = {"/d/file.txt": b"over http\n", "/t.tgz": buffer.getvalue()}
    digest = hashlib.sha256(b"over http\n").hexdigest()
    text = BASE + (
        f"ADD {server}/d/file.txt?x=1 /in/\nADD --chmod=755 --chown=3:4 {server}/d/file.txt /renamed\n"
        f"ADD --checksum=sha256:{digest} {server}/d/file.txt /sum\nADD {server}/t.tgz /kept/\n"
        f"ADD --unpack=true {server}/t.tgz /unpacked/\n"
    )
    result = build(engine, text)
    seen = output(engine, result.image, "stat -c '%n %a %u:%g %Y' /in/* /renamed /sum; ls /kept /unpacked; cat /sum")
    assert seen == (
        "/in/file.txt 600 0:0 1700000000\n/renamed 755 3:4 1700000000\n/sum 600 0:0 1700000000\n"
        "/kept:\nt.tgz\n\n/unpacked:\ninside\nover http\n"
    )
    Server.asked.clear()
    assert all(step.cached for step in build(engine, text).steps)
    assert {code for _, code in Server.asked} == {304}
    Server.files["/d/file.txt"] = b"changed\n"
    assert "changed" in build(engine, text.partition("ADD --chmod")[0]).steps[-1].why


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ADD {}/none /x", "invalid response status 404"),
        ("ADD {}/short /x", "failed to load|ended after"),
        (f"ADD --checksum=sha256:{'0' * 64} {{}}/there /x", "digest mismatch"),
    ],
)
def test_a_download_that_fails_names_its_line(engine: Engine, server: str, line: str, words: str) -> None:
    Server.files = {"/there": b"x", "/short": b"y"}
    with pytest.raises(BuildError, match=words) as caught:
        build(engine, BASE + line.format(server))
    assert caught.value.line == 2


@pytest.fixture
def repository(tmp_path: Path) -> str:
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    work = tmp_path / "repo.git"
    work.mkdir()
    (work / "sub").mkdir()
    (work / "Dockerfile").write_text(BASE + "COPY . /top\n")
    (work / "sub/Dockerfile").write_text(BASE + "COPY . /sub\n")
    (work / "sub/file").write_text("first\n")
    git = ["git", "-C", str(work), "-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
    subprocess.run([*git, "tag", "v1"], check=True)
    (work / "sub/file").write_text("second\n")
    subprocess.run([*git, "commit", "-q", "-a", "-m", "two"], check=True)
    return f"file://{work}"


def test_add_of_a_repository(engine: Engine, repository: str) -> None:
    text = BASE + f"ADD {repository}#v1:sub /old/\nADD --keep-git-dir {repository} /new/\nADD {repository} /plain\n"
    result = build(engine, text)
    assert output(engine, result.image, "cat /old/file /new/sub/file; ls -d /new/.git; ls -A /plain") == (
        "first\nsecond\n/new/.git\nDockerfile\nsub\n"
    )
    where = repository.removeprefix("file://")
    text = BASE + f"ADD {repository}?tag=v1&subdir=sub /old/\nADD {repository}?branch=main&keep-git-dir=1 /new/\n"
    result = build(engine, text)
    assert output(engine, result.image, "cat /old/file /new/sub/file; ls -d /new/.git") == "first\nsecond\n/new/.git\n"
    with pytest.raises(BuildError, match="inconsistent keep-git-dir"):
        build(engine, BASE + f"ADD --keep-git-dir=false {repository}?keep-git-dir=true /new/\n")
    with pytest.raises(BuildError, match="checksum mismatch"):
        build(engine, BASE + f"ADD --checksum={'a' * 40} {repository}?checksum={'b' * 40} /new/\n")
    commit = subprocess.run(["git", "-C", where, "rev-parse", "v1"], capture_output=True, check=True).stdout.decode()
    build(engine, BASE + f"ADD --checksum={commit[:12]} {repository}#v1 /x\n")
    with pytest.raises(BuildError, match="expected checksum to match"):
        build(engine, BASE + f"ADD --checksum={commit[:12]} {repository}#main /x\n")
    with pytest.raises(BuildError, match="git fetch failed") as caught:
        build(engine, BASE + f"ADD {repository}#nowhere /x\n")
    assert caught.value.line == 2


def test_git_words() -> None:
    assert is_git("git@example.org:me/it.git")
    assert is_git("https://example.org/it.git#v1:dir")
    assert not is_git("https://example.org/it.tar")
    assert parse_git("https://e.org/r.git#main:a/../../b").subdirectory == "b"
    with pytest.raises(UsageError):
        parse_git("https://e.org/r.git#--upload-pack=x")
    assert is_git("https://e.org/r.git?branch=x")
    assert not is_git("https://e.org/r?x=.git")
    assert parse_git("https://e.org/r.git?tag=v1&subdir=a&keep-git-dir&submodules=false") == GitSource(
        "https://e.org/r.git", "refs/tags/v1", "a", keep_git=True, submodules=False
    )
    assert parse_git("https://e.org/r.git?commit=abcdef0").ref == "abcdef0"
    assert parse_git("https://e.org/r.git?ref=main#main:d") == GitSource("https://e.org/r.git", "main", "d")
    for query, message in (
        ("nonsense=1", 'unexpected query "nonsense"'),
        ("ref=", 'query "ref" .* has no value'),
        ("ref=a&ref=b", "multiple values"),
        ("ref=a#b", "ref .* conflicts"),
        ("branch=a&tag=a", "ref .* conflicts"),
        ("subdir=a#:b", "subdir .* conflicts"),
        ("submodules=maybe", "invalid submodules value"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_git(f"https://e.org/r.git?{query}")


# -- contexts and flags of the command line --------------------------------------------------------------------------


def test_contexts_of_the_command(cli: Cli, engine: Engine, repository: str, tmp_path: Path) -> None:
    done = cli("build", "-q", f"{repository}#v1:sub")
    assert done.returncode == 0, done.stderr
    assert output(engine, engine.images.get(done.stdout.decode().strip()), "cat /sub/file") == "first\n"
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in (("Other", BASE + "COPY x /x\n"), ("x", "from a tar\n")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data.encode()))
    done = cli("build", "-q", "-f", "Other", "-", input=buffer.getvalue())
    assert done.returncode == 0, done.stderr
    assert output(engine, engine.images.get(done.stdout.decode().strip()), "cat /x") == "from a tar\n"
    (tmp_path / "ctx").mkdir()
    (tmp_path / "ctx/y").write_text("y\n")
    done = cli("build", "-q", "-f", "-", "ctx", input=BASE.encode() + b"COPY y /y\n")
    assert done.returncode == 0, done.stderr
    assert b"stdin for both" in cli("build", "-f", "-", "-").stderr
    assert b"git fetch failed" in cli("build", f"file://{tmp_path}/nothing.git").stderr


def test_the_moment_of_a_context(cli: Cli, engine: Engine, repository: str, server: str, tmp_path: Path) -> None:
    """SOURCE_DATE_EPOCH: of the environment as with buildx, and `context`: of a commit, an archive, no directory."""

    def made(*words: str, **env: str) -> tuple[str, str]:
        variables = {**os.environ, "LABKERNEL_ROOT": str(engine.layout.root), **env}
        variables |= {
            "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
            "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        }
        text = b"FROM scratch\nARG SOURCE_DATE_EPOCH\nENV E=$SOURCE_DATE_EPOCH\n"
        done = cli("build", "-q", "-f", "-", *words, input=text, env=variables)
        assert done.returncode == 0, done.stderr
        image = engine.images.get(done.stdout.decode().strip())
        return image.raw_config["created"][:10], image.config["Env"][-1]

    (tmp_path / "empty").mkdir()
    assert made("empty", SOURCE_DATE_EPOCH="86400") == ("1970-01-02", "E=86400")
    assert made("empty", "--build-arg", "SOURCE_DATE_EPOCH=172800", SOURCE_DATE_EPOCH="86400") == (
        "1970-01-03",
        "E=172800",
    )
    git = ["git", "-C", repository.removeprefix("file://"), "log", "-1", "--format=%ct"]
    seconds = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    day = datetime.fromtimestamp(int(seconds), UTC).strftime("%Y-%m-%d")
    assert made(repository, "--build-arg", "SOURCE_DATE_EPOCH=context") == (day, f"E={seconds}")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("x"))
    Server.files = {"/tree.tar": buffer.getvalue()}
    assert made(f"{server}/tree.tar", SOURCE_DATE_EPOCH="context") == ("2023-11-14", "E=1700000000")
    assert made("empty", SOURCE_DATE_EPOCH="context")[1] == "E=", "a directory of this machine has no moment"


def test_flags_of_the_command(cli: Cli, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("abc")
    (tmp_path / "Dockerfile").write_text(
        BASE + "RUN --mount=type=secret,id=t --mount=type=secret,id=MINE,env=E "
        'echo "$(cat /run/secrets/t | wc -c) $E" > /seen; grep -c a.name /etc/hosts >> /seen\n'
    )
    words = ["--secret", "id=t,src=token", "--secret", "id=MINE", "--add-host", "a.name:10.0.0.1", "--network", "none"]
    done = cli(
        "build", *words, "--label", "a=b", "-t", "lk-f:1", "-t", "lk-f:2", "--iidfile", "iid", "--memory=64m", "."
    )
    assert done.returncode == 0, done.stderr
    image = engine.images.get("lk-f:2")
    assert (tmp_path / "iid").read_text() == image.id == engine.images.get("lk-f:1").id
    assert output(engine, image, "cat /seen") == "3 from the environment\n1\n"
    steps = [json.loads(line) for line in cli("build", *words, "--progress", "json", ".").stderr.splitlines()]
    assert {step["status"] for step in steps} <= {"started", "cached", "done"}
    for bad, message in (
        (["--platform", "linux/s390x"], b"there is none for linux/s390x"),
        (["--output", "type=tar,dest=x,rewrite-timestamp=maybe"], b"non-bool value 'maybe' specified"),
        (["--cache-to", "type=s3,bucket=x"], b"type=s3 is not supported"),
        (["--cache-from", "type=inline"], b"type=inline is not supported"),
        (["--cache-to", "type=registry"], b"type=registry needs ref=NAME"),
        (["--output", "type=surprise"], b"type=surprise is not supported"),
        (["--secret", "id=t,src=missing"], b"failed to stat"),
        (["--add-host", "x:y"], b"invalid IP address"),
        (["--allow", "all"], b"invalid entitlement"),
        (["--ssh", "default=token"], b"cannot be loaded"),
        (["--cache-from", "type=local,src=ctx-none"], b"holds no build cache"),
    ):
        done = cli("build", *bad, ".")
        assert done.returncode != 0
        assert message in done.stderr
        assert b"Traceback" not in done.stderr


def test_check(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(BASE + "MAINTAINER me\n")
    done = cli("build", "--check", ".")
    assert done.returncode == 1  # as docker's
    assert b"WARNING: MaintainerDeprecated" in done.stdout
    assert b"2 | >>> MAINTAINER me" in done.stdout
    (tmp_path / "Dockerfile").write_text(BASE)
    assert cli("build", "--check", ".").returncode == 0
    (tmp_path / "Dockerfile").write_text("# check=error=true\n" + BASE + "MAINTAINER me\n")
    assert cli("build", "--check", ".").returncode == 1
    (tmp_path / "Dockerfile").write_text("FRMO x\n")
    assert b"did you mean FROM" in cli("build", "--check", ".").stderr


def test_outputs(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY Dockerfile /sub/dir/\n")
    done = cli("build", "-o", "out", "--output", "type=tar,dest=o.tar", "--output", "type=oci,dest=oci.tar", ".")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/sub/dir/Dockerfile").read_text().startswith("FROM scratch")
    with tarfile.open(tmp_path / "o.tar") as tar:
        assert "sub/dir/Dockerfile" in tar.getnames()
    with tarfile.open(tmp_path / "oci.tar") as tar:
        assert {"index.json", "oci-layout"} <= set(tar.getnames())
    piped = cli("build", "-o", "-", ".")
    with tarfile.open(fileobj=io.BytesIO(piped.stdout)) as tar:
        assert "sub/dir/Dockerfile" in tar.getnames()

    clamped = ["--output", "type=tar,dest=c.tar,rewrite-timestamp=true,compression=zstd"]
    done = cli("build", "--build-arg", "SOURCE_DATE_EPOCH=1500000000", *clamped, ".")
    assert done.returncode == 0
    assert b"compression is not supported and changes nothing" in done.stderr
    assert b"rewrite-timestamp" not in done.stderr
    with tarfile.open(tmp_path / "c.tar") as tar:
        assert {member.mtime for member in tar if member.name.strip("./")} == {1_500_000_000}


# -- caches and the graph --------------------------------------------------------------------------------------------


def test_a_cache_travels_to_another_store(engine: Engine, fresh_engine: Engine, tmp_path: Path) -> None:
    text = "FROM scratch\nCOPY <<a /a\ntext\na\nENV X=1\nCOPY <<b /b\nmore\nb\n"
    first = build(engine, text, cache_to=tmp_path / "cache")
    again = build(fresh_engine, text, cache_from=[tmp_path / "cache"])
    assert all(step.cached for step in again.steps)
    assert again.image.id == first.image.id
    blobs = sorted((tmp_path / "cache/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    index = json.loads((tmp_path / "cache/index.json").read_text())
    named = tmp_path / "cache/blobs/sha256" / index["manifests"][0]["digest"][7:]
    assert named in blobs
    named.write_text("{}")
    with pytest.raises(BuildError, match="holds no build cache"):
        build(fresh_engine, text, cache_from=[tmp_path / "cache"])


def test_a_cache_travels_through_a_registry(engine: Engine, fresh_engine: Engine, cli: Cli, tmp_path: Path) -> None:
    """As an artifact of its own, and inside the image; only layers of steps that are found are fetched."""
    mark = os.urandom(8).hex()
    text = f"FROM scratch\nCOPY <<a /a\n{mark}\na\nENV X=1\nCOPY <<b /b\nmore\nb\n"
    (tmp_path / "Dockerfile").write_text(text)
    with serving(tmp_path / "registry") as domain:
        name = f"{domain}/lab/cached:1"
        words = ["--cache-to", f"type=registry,ref={domain}/lab/cache,mode=max", "--cache-to", "type=inline"]
        done = cli("build", *words, "-t", name, "--cache-from", f"{domain}/lab/absent", ".")
        assert done.returncode == 0, done.stderr
        assert f"importing the cache from {domain}/lab/absent".encode() in done.stderr
        first = engine.images.get(name)
        assert "labkernel.cache.v0" in first.raw_config
        engine.pushes.push(name)

        other = text.replace("more", "other")
        place = CachePlace("registry", f"{domain}/lab/cache")
        again = build(fresh_engine, other, cache_from=[place])
        assert [step.cached for step in again.steps] == [True, True, True, False]
        assert not fresh_engine.blobs.has(first.layers[1].digest)  # nobody asked for it
        assert "labkernel.cache.v0" not in again.image.raw_config
        fresh_engine.images.remove(again.image.id)
        fresh_engine.builds.prune()
        again = build(fresh_engine, text, cache_from=[CachePlace("registry", name)], cache_to=CachePlace("inline"))
        assert all(step.cached for step in again.steps)
        assert again.image.id == first.id
    # A registry that has gone costs the cache, not the build.
    fresh_engine.builds.prune()
    again = build(fresh_engine, text, cache_from=[place])
    assert any(warning.startswith("importing the cache from") for warning in again.warnings)


def test_independent_stages_run_side_by_side(engine: Engine) -> None:
    """Each of two stages waits until the other one runs: that ends only when they run at the same time."""
    meet = f"RUN --mount=type=cache,id={os.urandom(8).hex()},target=/m touch /m/{{}}; "
    wait = "while [ $(ls /m | wc -l) -lt 2 ]; do sleep 0.02; done; echo {} > /x\n"
    text = (
        f"FROM lab/busybox AS one\n{(meet + wait).format('one', 'one')}"
        f"FROM lab/busybox AS two\n{(meet + wait).format('two', 'two')}"
        "FROM lab/busybox AS unneeded\nRUN exit 1\n"
        "FROM lab/busybox\nCOPY --from=one /x /one\nCOPY --from=two /x /two\n"
    )
    seen: list[BuildStep] = []
    result = build(engine, text, on_step=seen.append)
    assert output(engine, result.image, "cat /one /two") == "one\ntwo\n"
    assert sorted(step.number for step in result.steps) == list(range(1, 8))
    assert all(step.cached for step in build(engine, text).steps)


def test_a_failing_stage_ends_the_others(engine: Engine) -> None:
    text = (
        f"FROM lab/busybox AS one\nENV A={os.urandom(8).hex()}\nRUN sleep 1000\n"
        f"FROM lab/busybox AS two\nENV A={os.urandom(8).hex()}\nRUN exit 9\n"
        "FROM lab/busybox\nCOPY --from=one /x /one\nCOPY --from=two /x /two\n"
    )
    seen: list[tuple[str, str]] = []
    with pytest.raises(BuildError) as caught:
        build(engine, text, on_step=lambda step: seen.append((step.stage, step.status)))
    assert (caught.value.status, caught.value.line) == (9, 6)
    assert [stage for stage, status in seen if status == "failed"] == ["two"]
    assert not engine.runtime.states()


def test_no_cache_filter(engine: Engine) -> None:
    text = "FROM lab/busybox AS one\nRUN true\nFROM one AS two\nRUN echo two > /two\n"
    build(engine, text)
    again = build(engine, text, no_cache_filter=["two"])
    assert [step.cached for step in again.steps] == [True, True, True, False]


def test_files_given_with_a_build_lie_in_the_store_and_go_with_it(engine: Engine) -> None:
    """A killed build's are then swept away by the store's next opener, as all that nobody locks in its `tmp`."""
    with Context(None, {"app/a.txt": b"a"}, engine.layout, engine.db) as context:
        assert context.directory is not None
        assert context.directory.parent == engine.layout.tmp
        assert is_locked(context.directory)
        assert (context.directory / "app/a.txt").read_bytes() == b"a"
    before = set(engine.layout.tmp.iterdir())
    assert context.directory not in before
    with pytest.raises(StoreError), Context(None, {"a": b"", "a/b": b""}, engine.layout, engine.db):
        pass
    with pytest.raises(UsageError, match="inside the context"), Context(None, {"../a": b""}, engine.layout, engine.db):
        pass
    assert set(engine.layout.tmp.iterdir()) <= before
