"""Many processes at once on one store, and clients that are killed in the middle: nothing is lost or left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from labkernel.engine import Engine

REPO = Path(__file__).resolve().parent.parent
BUSYBOX = "lab/busybox"
CLIENTS = 50
KILLS = 25
SEED = 20_26

CLIENT = f"""
import sys, labkernel
from labkernel.errors import ConflictError, NoSuchImage
number = int(sys.argv[1])
sys.stdin.readline()
lab = labkernel.connect()
text = f"FROM {BUSYBOX}\\nRUN echo shared > /shared\\nRUN echo {{number % 3}} > /number\\n"
for turn in range(2):
    tag = f"lk-many/{{number}}:{{turn}}"
    image = lab.builds.build(text, tags=[tag]).image
    out = lab.containers.run(tag, ["sh", "-c", "cat /shared /number"], remove=True)
    assert out == f"shared\\n{{number % 3}}\\n".encode(), out
    c = lab.containers.run(tag, ["sleep", "300"], detach=True, name=f"many-{{number}}-{{turn}}")
    assert c.exec_run(["echo", "in"]).output == b"in\\n"
    assert any(each.id == c.id for each in lab.containers.list())
    c.remove(force=True)
    lab.images.remove(tag)
print("done")
lab.close()
"""


def environment(engine: Engine) -> dict[str, str]:
    return {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "PYTHONPATH": str(REPO),
    }


def start(engine: Engine, code: str, *words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment(engine), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def check_when_settled(engine: Engine, seconds: float = 15.0) -> list[str]:
    """`engine.check()`, once teardown, which follows the answers, is over."""
    deadline = time.monotonic() + seconds
    while (found := engine.check()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [str(problem) for problem in found]


@pytest.mark.timeout(400)
def test_many_clients_on_a_fresh_store(fresh_engine: Engine) -> None:
    """All begin at one moment on a store without a supervisor, a base image, or a layer."""
    clients = [start(fresh_engine, CLIENT, str(number)) for number in range(CLIENTS)]
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    answers = [client.communicate(timeout=300) for client in clients]
    assert [out for out, _ in answers] == ["done\n"] * CLIENTS, [err[-1500:] for _, err in answers if err][:2]
    assert check_when_settled(fresh_engine) == []
    assert fresh_engine.containers.list(all=True) == []
    assert os.listdir(fresh_engine.layout.containers) == []
    assert not any(tag.startswith("lk-many") for image in fresh_engine.images.list() for tag in image.tags)


FIRST = """
import sys, labkernel
sys.stdin.readline()
info = labkernel.connect().runtime.ensure()
print(info.keeper_pid, info.pid)
"""


def test_the_first_use_is_a_race_that_one_wins(fresh_engine: Engine) -> None:
    clients = [start(fresh_engine, FIRST) for _ in range(8)]
    for client in clients:
        assert client.stdin is not None
        client.stdin.write("go\n")
        client.stdin.flush()
    answers = [client.communicate(timeout=60) for client in clients]
    assert all(client.returncode == 0 for client in clients), [err for _, err in answers]
    assert len({out for out, _ in answers}) == 1, "two supervisors serve one store"
    name = f"labkernel supervisor of {fresh_engine.layout.root}".encode()
    titles = [path for path in Path("/proc").glob("[0-9]*/cmdline") if name in _read(path)]
    keepers = {int(out.split()[0]) for out, _ in answers}
    heads = {pid for path in titles if (pid := int(path.parent.name)) in keepers}
    assert heads == keepers
    assert check_when_settled(fresh_engine) == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


# -- kill -9 in the middle ---------------------------------------------------------------------------------------------

BUILD = f"""
import sys, labkernel
lab = labkernel.connect(); lab.runtime.ensure()
print("go", flush=True)
lab.builds.build("FROM {BUSYBOX}\\nENV TURN=" + sys.argv[1] + "\\nCOPY data /data\\nRUN cp /data /data2\\n"
                 "RUN rm /data && echo x > /x\\n", files={{"data": bytes(range(256)) * 8000}}, tags=["lk-kill/built"])
"""
IMPORT = """
import sys, labkernel
lab = labkernel.connect(); lab.runtime.ensure()
print("go", flush=True)
image = lab.images.import_tar(sys.argv[2], repository="lk-kill/imported", tag="t" + sys.argv[1])
lab.containers.create(image, ["/bin/sh"])
"""
RUN = f"""
import sys, labkernel
lab = labkernel.connect(); lab.runtime.ensure()
print("go", flush=True)
for turn in range(3):
    lab.containers.create("{BUSYBOX}", "true", name="kill-" + sys.argv[1]).start()
    lab.containers.get("kill-" + sys.argv[1]).remove(force=True)
    lab.containers.run("{BUSYBOX}", ["echo", "hello"], remove=True)
"""
# How long each takes undisturbed on a slow day: a kill falls somewhere in there.
SPANS_S = {"build": 1.0, "import": 0.4, "run": 0.4}


@pytest.mark.parametrize("what", list(SPANS_S))
def test_a_killed_client_leaves_nothing_that_prune_does_not_find(
    fresh_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    engine = fresh_engine
    engine.containers.run(BUSYBOX, "true", remove=True)
    (tmp_path / "big").write_bytes(os.urandom(3 << 20))
    with tarfile.open(tmp_path / "root.tar", "w") as tar:
        tar.add("/bin/busybox", "bin/sh")
        tar.add(tmp_path / "big", "big")
    code = {"build": BUILD, "import": IMPORT, "run": RUN}[what]
    moments = random.Random(SEED + len(what))
    for turn in range(KILLS // len(SPANS_S) + 1):
        client = start(engine, code, str(turn), str(tmp_path / "root.tar"))
        assert client.stdout is not None
        assert client.stdout.readline() == "go\n"
        try:
            client.wait(timeout=moments.uniform(0, SPANS_S[what]))
        except subprocess.TimeoutExpired:
            client.send_signal(signal.SIGKILL)
        client.communicate(timeout=60)
        # the store can be used at once, by everybody
        assert engine.containers.run(BUSYBOX, ["echo", str(turn)], remove=True) == f"{turn}\n".encode()
    # whatever is left is what prune removes, also what is too young to be called a leftover
    monkeypatch.setattr("labkernel.containers.LEFTOVER_AGE_S", -1.0)
    monkeypatch.setattr("labkernel.consistency.SETTLING_S", -1.0)
    for problem in engine.check():
        assert "prune" in problem.remedy or problem.kind in ("cgroup", "container"), problem
    engine.containers.reconcile()
    for container in engine.containers.list(all=True):
        container.remove(force=True)
    engine.images.prune({"dangling": False})
    assert check_when_settled(engine) == []
    assert os.listdir(engine.layout.containers) == []
    assert os.listdir(engine.layout.tmp) == []
    assert engine.check(verify=True) == []
    # and the same again works
    client = start(engine, code, "again", str(tmp_path / "root.tar"))
    _, err = client.communicate(timeout=60)
    assert client.returncode == 0, err[-2000:]
    assert check_when_settled(engine) == []
