"""Automated builds with real git: a push to a repository is built and published; polling; the log; failures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from registries import docker_registry
from waiting import wait_until

from labkernel.cli import TerminalHost, run
from labkernel.engine import Engine
from labkernel.errors import BuildError, ConflictError, UsageError
from labkernel.imaging.autobuilds import NoSuchAutobuild
from labkernel.store.locks import Locks

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed (apt-get install git)")

DOCKERFILE = "FROM lab/busybox\nARG WORD=none\nCOPY hello /hello\nRUN echo word $WORD; cat /hello\n"
DEADLINE_S = 90.0


class Work:
    """A bare repository and a clone of it to push from."""

    def __init__(self, base: Path, engine: Engine) -> None:
        self.bare, self.clone = base / "class.git", base / "clone"
        self.env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")} | {
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@example.org",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@example.org",
        }
        self.git("init", "-q", "--bare", "-b", "main", str(self.bare), cwd=base)
        self.git("init", "-q", "-b", "main", str(self.clone), cwd=base)
        self.git("remote", "add", "origin", str(self.bare))

    def git(self, *words: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            ["git", *words], cwd=cwd or self.clone, env=self.env, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def push(self, hello: str, dockerfile: str = DOCKERFILE, branch: str = "main") -> str:
        (self.clone / "hello").write_text(hello)
        (self.clone / "Dockerfile").write_text(dockerfile)
        self.git("add", ".")
        self.git("commit", "-q", "--allow-empty", "-m", f"say {hello}")
        return self.git("push", "-q", "origin", f"HEAD:{branch}")


@pytest.fixture
def work(tmp_path: Path, fresh_engine: Engine) -> Work:
    return Work(tmp_path, fresh_engine)


@pytest.fixture
def domain(tmp_path: Path) -> Iterator[str]:
    with docker_registry(tmp_path) as domain:
        yield domain


def test_a_push_is_built_and_published(
    fresh_engine: Engine, work: Work, domain: str, capfd: pytest.CaptureFixture[str]
) -> None:
    name = f"{domain}/class/web:v1"
    host = TerminalHost(lambda: fresh_engine)
    work.push("first")
    assert run(["registry", "autobuild", "-t", name, "--build-arg", "WORD=abc", str(work.bare)], host) == 0
    told = capfd.readouterr()
    assert "word abc" in told.err
    assert "published as" in told.err
    said = work.push("second")
    assert "remote: word abc" in said
    assert "remote: second" in said
    work.push("elsewhere", branch="other")
    log = fresh_engine.autobuilds.log(name)
    assert [(build.number, build.subject, build.status) for build in log] == [
        (1, "say first", "published"),
        (2, "say second", "published"),
    ]
    fresh_engine.images.remove(name)
    assert fresh_engine.pulls.pull(name).digest == log[1].digest
    labels = fresh_engine.images.get(name).labels
    assert labels["org.opencontainers.image.revision"] == log[1].commit
    assert run(["registry", "autobuild", "log", name, "2"], host) == 0
    assert "second" in capfd.readouterr().out
    assert run(["registry", "autobuild", "ls", "--format", "json"], host) == 0
    assert json.loads(capfd.readouterr().out)["LastBuild"].startswith("2: published")
    assert run(["registry", "autobuild", "rm", str(work.bare)], host) == 0
    assert not (work.bare / "hooks/post-receive").exists()
    assert run(["registry", "autobuild", "log", name], host) == 1


def test_a_build_that_fails_is_in_the_log_and_the_next_push_is_built(fresh_engine: Engine, work: Work) -> None:
    work.push("fine")
    made = fresh_engine.autobuilds.add(str(work.bare), "lab/of-git", push=False)
    said = work.push("broken", "FROM lab/busybox\nRUN echo about to fail && false\n")
    assert "about to fail" in said
    said = work.push("no registry there", DOCKERFILE)
    failed, built = fresh_engine.autobuilds.log(made.id)
    assert failed.status == "failed"
    assert "false" in failed.error
    assert built.status == "built"
    assert "about to fail" in fresh_engine.autobuilds.output(made.id, 1)
    assert fresh_engine.autobuilds.run(made.id) is None
    assert fresh_engine.images.get("lab/of-git").id == built.image


def test_what_cannot_be_meant_is_refused(fresh_engine: Engine, work: Work, tmp_path: Path) -> None:
    service = fresh_engine.autobuilds
    with pytest.raises(BuildError, match="git ls-remote failed"):
        service.add(str(tmp_path), "lab/x")
    with pytest.raises(UsageError, match="not on this machine"):
        service.add(f"file://{work.bare}", "lab/x")
    with pytest.raises(UsageError, match="not a branch"):
        service.add(str(work.bare), "lab/x", branch="--upload-pack=x")
    with pytest.raises(NoSuchAutobuild):
        service.get("nothing")
    hook = work.bare / "hooks/post-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\nexit 0\n")
    with pytest.raises(ConflictError, match="hook of its own"):
        service.add(str(work.bare), "lab/x")
    assert service.list() == []
    assert hook.read_text() == "#!/bin/sh\nexit 0\n"
    hook.unlink()
    made = [service.add(str(work.bare), f"lab/x{number}") for number in range(2)]
    with pytest.raises(ConflictError, match="already"):
        service.add(str(work.bare), "lab/x1")
    assert len(hook.read_text().splitlines()) == 4
    service.remove(made[0].id)
    assert made[1].id in hook.read_text()


def test_a_repository_is_asked_now_and_then(fresh_engine: Engine, work: Work) -> None:
    service = fresh_engine.autobuilds
    made = service.add(f"file://{work.bare}", "lab/polled", push=False, poll_s=1)
    ended = threading.Event()
    thread = threading.Thread(target=service.watch, kwargs={"ended": lambda wait_s: ended.wait(min(wait_s, 0.1))})
    thread.start()
    try:
        wait_until(lambda: service.watcher() is not None)
        with pytest.raises(ConflictError, match="another process"):
            service.watch()
        work.push("one")
        wait_until(lambda: len(service.log(made.id)) == 1)
        work.push("two")
        wait_until(lambda: len(service.log(made.id)) == 2)
        service.remove(made.id)
        thread.join(DEADLINE_S)  # with nothing left to ask it ends by itself
        assert not thread.is_alive()
    finally:
        ended.set()
        thread.join(DEADLINE_S)
    assert service.watcher() is None


def test_asking_whether_somebody_watches_keeps_nobody_from_it(
    fresh_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watcher that was just being started ended at once with "another process watches", now and then."""
    asking = ExitStack()
    asking.enter_context(Locks(fresh_engine.layout.locks).exclusive("autobuild-watch"))
    monkeypatch.setattr("labkernel.store.locks.time.sleep", lambda seconds: asking.close())
    fresh_engine.autobuilds.watch()  # nothing is polled, so it ends


def test_the_watcher_is_a_process_that_ends_with_the_last_one(
    fresh_engine: Engine, work: Work, capfd: pytest.CaptureFixture[str]
) -> None:
    host = TerminalHost(lambda: fresh_engine)
    assert run(["registry", "autobuild", str(work.bare), "-t", "lab/p", "--no-push", "--poll", "1"], host) == 0
    assert fresh_engine.autobuilds.watcher() not in (None, os.getpid())
    assert run(["registry", "autobuild", "rm", "lab/p"], host) == 0
    wait_until(lambda: fresh_engine.autobuilds.watcher() is None)
    assert run(["registry", "autobuild", str(work.bare), "-t", "lab/p", "--poll", "0.01"], host) != 0
