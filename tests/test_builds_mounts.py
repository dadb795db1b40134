"""RUN --mount, --network and --security on the real engine."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from building import BASE, fresh, output
from waiting import wait_until

from labkernel.building.result import BuildResult
from labkernel.engine import Engine
from labkernel.errors import BuildError, UsageError

SECRET = b"hunter2-very-secret"


def build(engine: Engine, text: str, **more: Any) -> BuildResult:
    return engine.builds.build(fresh(text), **more)


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context"
    (path / "src").mkdir(parents=True)
    (path / "src/a.txt").write_text("a\n")
    (path / "left.out").write_text("never seen\n")
    (path / ".dockerignore").write_text("*.out\n")
    return path


def test_a_bind_of_the_context_is_there_and_leaves_nothing(engine: Engine, context: Path) -> None:
    text = (
        BASE
        + "WORKDIR /w\nRUN --mount=target=/ctx --mount=source=src/a.txt,target=one.txt "
        + "ls /ctx > /listed && cat one.txt > /one && ! touch /ctx/x 2>/dev/null\n"
        + "RUN --mount=target=/ctx,rw echo new > /ctx/src/a.txt && cat /ctx/src/a.txt > /two\n"
    )
    result = build(engine, text, context=context)
    assert output(engine, result.image, "cat /listed /one /two; ls -d /ctx /w/one.txt 2>&1 | grep -c 'No such'") == (
        "src\na\nnew\n2\n"
    )
    assert (context / "src/a.txt").read_text() == "a\n"


def test_a_bind_counts_by_content(engine: Engine, context: Path) -> None:
    text = BASE + f"ENV FRESH={os.urandom(8).hex()}\nRUN --mount=target=/ctx cp /ctx/src/a.txt /a\n"
    engine.builds.build(text, context=context)
    os.utime(context / "src/a.txt", (1, 1))
    assert engine.builds.build(text, context=context).steps[-1].cached
    (context / "src/a.txt").write_text("b\n")
    assert engine.builds.build(text, context=context).steps[-1].why == "RUN changed: --mount bind /ctx"


@pytest.mark.usefixtures("many_ids")
def test_a_bind_of_a_stage_and_of_an_image(engine: Engine) -> None:
    text = (
        "FROM lab/busybox AS tools\nRUN mkdir /t && echo tool > /t/x && chown 5:6 /t/x\n"
        "FROM lab/busybox\nRUN --mount=from=tools,source=/t,target=/mnt/t "
        "--mount=from=lab/busybox,source=/bin/busybox,target=/x/busybox "
        "stat -c %u:%g /mnt/t/x > /seen; cat /mnt/t/x >> /seen; /x/busybox echo bb >> /seen\n"
    )
    result = build(engine, text)
    assert output(engine, result.image, "cat /seen; ls /mnt/t 2>&1 | grep -c 'No such'") == "5:6\ntool\nbb\n1\n"


@pytest.mark.usefixtures("many_ids")
def test_a_cache_is_kept_between_builds_and_pruned(engine: Engine) -> None:
    engine.builds.prune()
    key = os.urandom(6).hex()
    line = f"RUN --mount=type=cache,id={key},target=/cache,uid=33,gid=44,mode=0750 "
    first = build(engine, BASE + line + "stat -c '%u:%g %a' /cache > /seen; echo kept > /cache/file\n")
    assert output(engine, first.image, "cat /seen; ls /cache 2>&1 | grep -c 'No such'") == "33:44 750\n1\n"
    second = build(engine, BASE + line + "cat /cache/file > /seen\n")
    assert output(engine, second.image, "cat /seen") == "kept\n"
    other = build(engine, BASE + "RUN --mount=type=cache,target=/cache ls -A /cache > /seen\n")
    assert output(engine, other.image, "cat /seen") == ""
    kept = {mount["id"] for mount in engine.builds.cache_mounts()}
    assert kept == {key, "/cache"}
    done = engine.builds.prune()
    assert f"cache mount {key}" in done["CachesDeleted"]
    assert engine.builds.cache_mounts() == []
    # and a cache that is read-only, and one that starts with the files of a stage
    text = (
        "FROM lab/busybox AS seed\nRUN mkdir /s && echo seeded > /s/f\nFROM lab/busybox\n"
        "RUN --mount=type=cache,from=seed,source=/s,target=/c,ro cat /c/f > /seen; touch /c/x || echo ro >> /seen\n"
    )
    assert output(engine, build(engine, text).image, "cat /seen") == "seeded\nro\n"


def test_how_caches_are_shared(engine: Engine) -> None:
    """Two builds at once: a locked cache is had by one after the other, private ones are two."""
    for sharing, expected in (("locked", {"1", "2"}), ("private", {"1"})):
        key = os.urandom(6).hex()
        line = (
            f"RUN --mount=type=cache,id={key},sharing={sharing},target=/c --mount=type=cache,id=meet{key},target=/m "
            "echo x >> /c/n; touch /m/$NAME; {wait} wc -l < /c/n > /count\n"
        )
        # Private ones wait for each other, which ends only when both run at the same time.
        wait = "while [ $(ls /m | wc -l) -lt 2 ]; do sleep 0.02; done;" if sharing == "private" else ""
        seen: list[str] = []

        def one(name: str, line: str = line, wait: str = wait, seen: list[str] = seen) -> None:
            text = BASE + f"ENV NAME={name}\n" + line.replace("{wait}", wait)
            seen.append(output(engine, build(engine, text).image, "cat /count").strip())

        threads = [threading.Thread(target=one, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert len(seen) == 2
        assert set(seen) == expected


def test_tmpfs(engine: Engine) -> None:
    text = BASE + "RUN --mount=type=tmpfs,target=/scratch,size=1m grep -c 'tmpfs /scratch tmpfs' /proc/mounts > /seen\n"
    result = build(engine, text)
    assert output(engine, result.image, "cat /seen; ls -d /scratch 2>&1 | grep -c 'No such'") == "1\n1\n"


@pytest.mark.usefixtures("many_ids")
def test_a_secret_is_used_and_stays_nowhere(engine: Engine) -> None:
    text = BASE + (
        "RUN --mount=type=secret,id=token --mount=type=secret,id=token,env=TOKEN "
        "--mount=type=secret,id=token,target=/own,uid=7,mode=0440 "
        "[ $(wc -c < /run/secrets/token) = 19 ] && [ ${#TOKEN} = 19 ] && stat -c '%u %a' /own /run/secrets/token > /s\n"
        "RUN --mount=type=secret,id=absent ls /run/secrets/absent 2>&1 | grep -c 'No such' > /absent\n"
    )
    text = text.replace(BASE, f"{BASE}ENV MINE={os.urandom(8).hex()}\n")
    result = engine.builds.build(text, secrets={"token": SECRET})
    assert output(engine, result.image, "cat /s /absent; ls -d /own 2>&1 | grep -c 'No such'") == "7 440\n0 400\n1\n1\n"
    # another value is the same step
    assert all(step.cached for step in engine.builds.build(text, secrets={"token": b"other"}).steps)
    found = subprocess.run(["grep", "-rlF", SECRET, str(engine.layout.root)], capture_output=True, check=False)
    assert found.stdout == b""
    assert SECRET.decode() not in str(result.image.raw_config)


def test_an_ssh_agent_is_forwarded(engine: Engine, tmp_path: Path) -> None:
    place = tmp_path / "agent"
    with socket.socket(socket.AF_UNIX) as agent:
        os.chdir(tmp_path)  # a short name
        agent.bind("agent")
        agent.listen()
        text = BASE + (
            "RUN --mount=type=ssh [ -S $SSH_AUTH_SOCK ] && echo $SSH_AUTH_SOCK > /seen\n"
            "RUN --mount=type=ssh,target=/own,mode=0660 stat -c '%F %a' /own >> /seen\n"
        )
        result = build(engine, text, ssh={"default": str(place)})
    seen = "/run/buildkit/ssh_agent.0\nsocket 660\n[]\n"
    assert output(engine, result.image, "cat /seen; echo [$SSH_AUTH_SOCK]") == seen


@pytest.mark.skipif(shutil.which("ssh-add") is None, reason="no openssh-client on this machine")
@pytest.mark.usefixtures("user_name")
def test_an_ssh_key_is_used_and_stays_nowhere(engine: Engine, tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    # `nc` of busybox has no unix sockets: what an agent says is tested below, here where the socket is
    text = BASE + "RUN --mount=type=ssh,id=k,required [ -S $SSH_AUTH_SOCK ] && echo $SSH_AUTH_SOCK > /seen\n"
    result = build(engine, text, ssh={"k": [str(key)]})
    assert output(engine, result.image, "cat /seen") == "/run/buildkit/ssh_agent.0\n"
    inside = key.read_text().splitlines()[2]
    found = subprocess.run(["grep", "-rlF", inside, str(engine.layout.root)], capture_output=True, check=False)
    assert found.stdout == b""
    with pytest.raises(BuildError, match="unset ssh forward key other"):
        build(engine, BASE + "RUN --mount=type=ssh,id=other,required true\n", ssh={"k": [str(key)]})


def test_networks(engine: Engine) -> None:
    ours = os.readlink("/proc/self/ns/net")
    text = BASE + "RUN --network={} readlink /proc/self/ns/net > /seen\n"
    assert output(engine, build(engine, text.format("none")).image, "cat /seen").strip() != ours
    with pytest.raises(BuildError, match=r"network\.host is not allowed") as caught:
        build(engine, text.format("host"))
    assert "--allow network.host" in str(caught.value.resolution)
    if engine.driver.name == "root":
        allowed = build(engine, text.format("host"), allow=["network.host"])
        assert output(engine, allowed.image, "cat /seen").strip() == ours


def test_insecure_only_when_allowed(engine: Engine) -> None:
    text = (
        BASE + "RUN --security=insecure grep CapEff /proc/self/status > /seen\nRUN grep CapEff /proc/self/status > /n\n"
    )
    with pytest.raises(BuildError, match=r"security\.insecure is not allowed"):
        build(engine, text)
    result = build(engine, text, allow=["security.insecure"])
    more, fewer = output(engine, result.image, "cat /seen /n").split()[1::2]
    assert int(more, 16).bit_count() > int(fewer, 16).bit_count()
    with pytest.raises(UsageError, match="invalid entitlement"):
        build(engine, text, allow=["everything"])


def test_limits_of_steps(engine: Engine) -> None:
    text = BASE + "RUN ulimit -n > /n; df -k /dev/shm | tail -1 > /shm\n"
    limits = {"ulimits": ["nofile=77:99"], "shm_size": "8m"}
    image = build(engine, text, limits=limits).image
    assert engine.containers.run(image, ["cat", "/n"], remove=True) == b"77\n"
    if engine.driver.name != "proot":
        assert engine.containers.run(image, ["cat", "/shm"], remove=True).split()[1] == b"8192"
    with pytest.raises(UsageError, match="not a limit of build steps: privileged"):
        build(engine, text, limits={"privileged": True})
    with pytest.raises(UsageError, match="invalid ulimit type"):
        build(engine, text, limits={"ulimits": ["nothing=1"]})


def test_hosts_and_memory(engine: Engine, needs: Any) -> None:
    result = build(engine, BASE + "RUN grep -c some.name /etc/hosts > /seen\n", extra_hosts=["some.name:10.1.2.3"])
    assert output(engine, result.image, "cat /seen; grep -c some.name /etc/hosts; true") == "1\n0\n"
    needs("cgroup memory")
    with pytest.raises(BuildError, match="out of memory"):
        build(engine, BASE + "RUN tail /dev/zero\n", memory_bytes=16 << 20)


_KILLED = """
import labkernel, os, signal, sys
def die(step):
    if step.output:
        while not lab.db.query("SELECT 1 FROM build_cache WHERE diff_id IS NOT NULL"):
            pass  # a step is remembered when its blob is safe on disk, which the next one does not wait for
        os.kill(os.getpid(), signal.SIGKILL)
with labkernel.connect(sys.argv[1], runtime_dir=sys.argv[2], driver=sys.argv[3]) as lab:
    lab.builds.build(sys.argv[4], on_step=die, secrets={"s": b"hunter2-very-secret"})
"""


def test_a_killed_builder_leaves_nothing(fresh_engine: Engine) -> None:
    engine = fresh_engine
    text = BASE + "RUN echo done > /done\nRUN --mount=type=secret,id=s echo started; sleep 1000\n"
    words = [str(engine.layout.root), str(engine.layout.runtime_dir), engine.driver.name, text]
    done = subprocess.run([sys.executable, "-c", _KILLED, *words], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    wait_until(lambda: not os.listdir(engine.layout.containers), "its RUN, tied to it, is gone")
    assert not engine.runtime.states()
    assert engine.check() == []
    # what was finished is not done again
    again = engine.builds.build(text.replace("sleep 1000", "true"))
    assert again.steps[1].cached


_PLAIN = """
import labkernel, sys
text = '''FROM lab/busybox AS tools
RUN mkdir /t && echo tool > /t/x
FROM lab/busybox
RUN --mount=type=cache,target=/c echo kept > /c/f
RUN --mount=type=cache,target=/c --mount=type=secret,id=s --mount=from=tools,source=/t,target=/m \\
 cat /c/f /run/secrets/s /m/x > /seen
'''
with labkernel.connect(driver=sys.argv[1]) as lab:
    built = lab.builds.build(text, secrets={"s": b"a secret\\n"})
    print(lab.containers.run(built.id, ["cat", "/seen"], remove=True).decode(), end="")
    lab.builds.prune()
    assert lab.builds.cache_mounts() == []
    lab.runtime.shutdown(force=True)
"""


@pytest.mark.parametrize("driver", ["rootless", "proot"])
def test_mounts_of_a_plain_user(plain_user: Any, driver: str) -> None:
    done = plain_user.python("-c", _PLAIN, driver)
    if "DriverError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "kept\na secret\ntool\n"


def test_an_interrupt_ends_all_stages(engine: Engine) -> None:
    wait = "RUN echo started; sleep 1000\n"
    text = f"FROM lab/busybox AS one\n{wait}FROM lab/busybox AS two\n{wait}FROM lab/busybox\n"
    text += "COPY --from=one / /1\nCOPY --from=two / /2\n"
    seen: list[str] = []

    def interrupt(step: Any) -> None:
        if step.output == b"started\n":
            seen.append(step.stage)
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.builds.build(text, on_step=interrupt)
    assert not engine.runtime.states()
