"""cp, diff, commit and export, on running and on stopped containers; links that lead out lead nowhere."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from labkernel.cli import TerminalHost, run
from labkernel.engine import Engine
from labkernel.errors import LabkernelError, UsageError
from labkernel.running.container import Container
from labkernel.running.files import NoSuchFile

SETUP = (
    "mkdir -p /d/e /w; echo x > /d/x; ln -s /d /ld; ln -s x /d/lx; ln -s /nope /dangling; rm /bin/vi;"
    "echo y >> /etc/passwd; touch /ready; exec sleep 1000"
)
Cli = Callable[..., int]


@pytest.fixture
def box(engine: Engine, needs: Any) -> Container:
    needs("overlay")
    found: Container = engine.containers.run("busybox", ["sh", "-c", SETUP], detach=True, name="box")
    found.exec_run(["sh", "-c", "until test -e /ready; do usleep 1000; done; rm /ready"])
    return found


@pytest.fixture(params=["running", "stopped"])
def either(request: pytest.FixtureRequest, box: Container) -> Container:
    if request.param == "stopped":
        box.stop(timeout=0)
    return box


@pytest.fixture
def cli(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return lambda *words: run(words, TerminalHost(lambda: engine))


def unpacked(chunks: Iterator[bytes]) -> dict[str, bytes | None]:
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as tar:
        return {
            member.name: tar.extractfile(member).read() if member.isreg() else None  # type: ignore[union-attr]
            for member in tar
        }


def tar_of(**files: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.uid, member.gid, member.mode = len(data), 7, 8, 0o640
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


# -- the Docker SDK's methods ----------------------------------------------------------------------------------------


def test_get_archive(either: Container) -> None:
    chunks, status = either.get_archive("/d")
    assert unpacked(chunks) == {"d": None, "d/e": None, "d/lx": None, "d/x": b"x\n"}
    assert (status["name"], status["mode"] & 1 << 31, status["linkTarget"]) == ("d", 1 << 31, "")
    chunks, status = either.get_archive("/d/x")
    assert unpacked(chunks) == {"x": b"x\n"}
    assert (status["size"], status["mode"]) == (2, 0o644)
    chunks, status = either.get_archive("/ld")
    assert unpacked(chunks) == {"ld": None}
    assert (status["linkTarget"], status["mode"] & 1 << 27) == ("/d", 1 << 27)
    assert "x" in unpacked(either.get_archive("/ld/.")[0])
    with pytest.raises(NoSuchFile, match="Could not find the file /nope in container box"):
        either.get_archive("/nope")


def test_put_archive(either: Container) -> None:
    assert either.put_archive("/w", tar_of(a=b"one", b=b"two"))
    assert either.put_archive("/ld/e", iter([tar_of(c=b"three")]))
    assert unpacked(either.get_archive("/w")[0]) == {"w": None, "w/a": b"one", "w/b": b"two"}
    assert unpacked(either.get_archive("/d/e/c")[0]) == {"c": b"three"}
    with tarfile.open(fileobj=io.BytesIO(b"".join(either.get_archive("/w/a")[0]))) as tar:
        assert tar.getmember("a").mode == 0o640
        if os.geteuid() == 0:
            assert (tar.getmember("a").uid, tar.getmember("a").gid) == (7, 8)
    with pytest.raises(NoSuchFile):
        either.put_archive("/none", tar_of(a=b""))
    with pytest.raises(UsageError, match="not a directory"):
        either.put_archive("/d/x", tar_of(a=b""))
    with pytest.raises(UsageError, match='cannot overwrite directory "/d/e" with non-directory "e"'):
        either.put_archive("/d", tar_of(e=b""))
    with pytest.raises(LabkernelError):
        either.put_archive("/w", b"no tar at all" * 100)


def test_volumes_are_seen(engine: Engine, either: Container, tmp_path: Path) -> None:
    (tmp_path / "inside").write_text("bound")
    volume = engine.volumes.create("files")
    try:
        container = engine.containers.create(
            "busybox", ["sleep", "1000"], volumes=[f"{tmp_path}:/bound:ro", "files:/deep/er"]
        )
        container.put_archive("/deep/er", tar_of(kept=b"yes"))
        user = "0" if engine.driver.id_mapping == "single" else "7:8"
        reader: Any = {"volumes": ["files:/deep/er:ro"], "user": user, "network_mode": "none", "remove": True}
        assert engine.containers.run("busybox", ["cat", "/deep/er/kept"], **reader) == b"yes"
        assert unpacked(container.get_archive("/bound/inside")[0]) == {"inside": b"bound"}
        with pytest.raises(LabkernelError):
            container.put_archive("/bound", tar_of(a=b""))
        assert container.diff() == []  # mount points that were made for this are gone again
        container.remove()
    finally:
        volume.remove()


def test_diff(either: Container) -> None:
    found = [("CAD"[change["Kind"]], change["Path"]) for change in either.diff()]
    assert found == [
        *(("C", "/bin"), ("D", "/bin/vi"), ("A", "/d"), ("A", "/d/e"), ("A", "/d/lx"), ("A", "/d/x")),
        *(("A", "/dangling"), ("C", "/etc"), ("C", "/etc/passwd"), ("A", "/ld"), ("A", "/w")),
    ]


def test_diff_of_a_directory_made_anew(engine: Engine, needs: Any) -> None:
    needs("overlay")
    container = engine.containers.create("busybox", ["sh", "-c", "rm -r /var && mkdir -p /var/lib && touch /var/new"])
    container.start()
    container.wait()
    found = {change["Path"]: change["Kind"] for change in container.diff()}
    assert (found["/var"], found["/var/cache"], found["/var/new"]) == (0, 2, 1)
    assert found.get("/var/lib", 0) == 0


def test_export(either: Container) -> None:
    with tarfile.open(fileobj=io.BytesIO(b"".join(either.export()))) as tar:
        names = set(tar.getnames())
    assert {"d/x", "ld", "bin/sh", "etc/passwd"} <= names
    assert "bin/vi" not in names


def test_commit(engine: Engine, either: Container) -> None:
    image = either.commit(
        "made", "here", author="me", message="why", changes=['CMD ["cat","/d/x"]', "ENV A=b"], conf={"WorkingDir": "/d"}
    )
    try:
        assert image.tags == ["made:here"]
        assert (image.raw_config["author"], image.history()[0]["Comment"]) == ("me", "why")
        assert image.config["WorkingDir"] == "/d"
        assert engine.containers.run("made:here", remove=True) == b"x\n"
        assert engine.containers.run("made:here", ["sh", "-c", "echo $A; pwd; ls /bin/vi || true"], remove=True) == (
            b"b\n/d\n"
        )
        assert len(image.layers) == len(either.image.layers) + 1
        assert either.status in ("running", "exited")
    finally:
        image.remove(force=True)


def test_an_archive_that_is_not_read_to_the_end(box: Container) -> None:
    chunks = box.export(chunk_size=512)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert box.diff()


# -- what a container may try ----------------------------------------------------------------------------------------


def test_links_stay_inside(either: Container, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host")
    with pytest.raises(NoSuchFile):
        either.get_archive(f"/../../..{secret}")
    either.put_archive("/w", _link("out", str(tmp_path)))
    with pytest.raises(NoSuchFile):
        either.get_archive("/w/out/secret")
    either.put_archive("/w", _link("up", "../../../../../../../../etc"))
    assert "up" in unpacked(either.get_archive("/w/up")[0])
    assert b"y\n" in (unpacked(either.get_archive("/w/up/passwd")[0])["passwd"] or b"")
    either.put_archive("/w/up", tar_of(fresh=b"inside"))
    assert unpacked(either.get_archive("/etc/fresh")[0]) == {"fresh": b"inside"}
    assert not Path("/etc/fresh").exists()
    with pytest.raises(LabkernelError):
        either.put_archive("/w", tar_of(**{"../../escape": b""}))


def _link(name: str, target: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, target
        tar.addfile(member)
    return out.getvalue()


def test_links_exchanged_meanwhile_lead_nowhere(box: Container, tmp_path: Path) -> None:
    """CVE-2018-15664: a directory becomes a link to the host's between the look and the use."""
    (tmp_path / "x").write_text("of the host")
    swap = f"mkdir /r; echo in > /r/x; while :; do mv /r /s; ln -s {tmp_path} /r; rm /r; mv /s /r; done"
    attachment = box.open_exec(["sh", "-c", swap])
    try:
        for _ in range(60):
            try:
                found = unpacked(box.get_archive("/r/x")[0])
                assert found == {"x": b"in\n"}
                box.put_archive("/r", tar_of(y=b"from cp"))
            except LabkernelError:
                continue  # it was not there at that moment
    finally:
        attachment.close()
    assert os.listdir(tmp_path) == ["x"]


# -- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "src/sub").mkdir(parents=True)
    (tmp_path / "src/a").write_text("one\n")
    (tmp_path / "src/sub/b").write_text("two\n")
    (tmp_path / "src/link").symlink_to("a")
    (tmp_path / "f").write_text("file\n")
    return tmp_path


# The same lines against dockerd 20.10 gave the same: (source, target, message or None, what is then there).
INTO = [
    ("f", "/w", None, "/w/f"),
    ("f", "/w/", None, "/w/f"),
    ("f", "/w/g", None, "/w/g"),
    ("f", "/nodir/g", "Could not find the file /nodir in container box", None),
    ("f", "/nodir/", "no such directory", None),
    ("src", "/w", None, "/w/src/sub/b"),
    ("src", "/w/new", None, "/w/new/sub/b"),
    ("src/.", "/w/dot", None, "/w/dot/sub/b"),
    ("src/.", "/w", None, "/w/sub/b"),
    ("src", "/d/x", "cannot copy directory", None),
    ("f", "/ld", None, "/d/f"),
    ("f", "/ld/via", None, "/d/via"),
    ("nope", "/w", "nope: no such file or directory", None),
]


@pytest.mark.parametrize(("source", "target", "message", "there"), INTO)
def test_cp_into(
    box: Container,
    cli: Cli,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    target: str,
    message: str | None,
    there: str | None,
) -> None:
    status = cli("cp", source, f"box:{target}")
    error = capsys.readouterr().err
    assert (status, message or "") == (1 if message else 0, message if message and message in error else error)
    if there:
        box.get_archive(there)


OUT = [
    ("/d/x", "new", None, {"new": "x\n"}),
    ("/d/x", ".", None, {"x": "x\n"}),
    ("/d", "new", None, {"new/x": "x\n"}),
    ("/d", "src", None, {"src/d/x": "x\n"}),
    ("/d/.", "src", None, {"src/x": "x\n", "src/a": "one\n"}),
    ("/d/lx", "new", None, {"new": "->x"}),
    ("-L /d/lx", "new", None, {"new": "x\n"}),
    ("/ld", "new", None, {"new": "->/d"}),
    ("/ld/", "new", None, {"new/x": "x\n"}),
    ("/d", "f", "cannot copy directory", {}),
    ("/d/x", "none/", "no such directory", {}),
    ("/d/x", "none/x", "invalid output path: directory", {}),
    ("/none", ".", "Could not find the file /none in container box", {}),
]


@pytest.mark.parametrize(("source", "target", "message", "there"), OUT)
def test_cp_out(
    box: Container,
    cli: Cli,
    files: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    target: str,
    message: str | None,
    there: dict[str, str],
) -> None:
    *flags, path = source.split()
    assert cli("cp", *flags, f"box:{path}", target) == (1 if message else 0)
    assert (message or "") in capsys.readouterr().err
    for name, text in there.items():
        found = files / name
        assert (f"->{os.readlink(found)}" if found.is_symlink() else found.read_text()) == text
        assert found.lstat().st_uid == os.geteuid()


def test_cp_words(box: Container, cli: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("cp", "a", "b") == 1
    assert "must specify at least one container source" in capsys.readouterr().err
    assert cli("cp", "box:/a", "box:/b") == 1
    assert "copying between containers is not supported" in capsys.readouterr().err
    assert cli("cp", "nobody:/a", ".") == 1
    assert "No such container: nobody" in capsys.readouterr().err


def test_cp_of_tars(box: Container, engine: Engine, files: Path) -> None:
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
    }
    line = 'tar cf - -C src . | "$@" cp - box:/w && "$@" cp box:/w - | tar tf - | sort'
    words = [os.sys.executable, "-m", "labkernel.cli"]  # type: ignore[attr-defined]
    repo = str(Path(__file__).resolve().parent.parent)
    found = subprocess.run(
        ["sh", "-c", line, "sh", *words],
        cwd=files,
        env={**env, "PYTHONPATH": repo},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["w/", "w/a", "w/link", "w/sub/", "w/sub/b"]


def test_commit_and_diff_and_export_as_commands(
    box: Container, cli: Cli, tmp_path: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli("diff", "box") == 0
    assert "C /etc\nC /etc/passwd" in capsys.readouterr().out
    assert cli("export", "-o", "out.tar", "box") == 0
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert "d/x" in tar.getnames()
    assert cli("commit", "-a", "me", "-m", "why", "-c", "CMD true", "box", "made:cli") == 0
    assert capsys.readouterr().out.startswith("sha256:")
    engine.images.get("made:cli").remove()
    for verb in ("diff", "export", "commit"):
        assert cli(verb, "nobody") == 1


def test_many_at_once(box: Container) -> None:
    box.stop(timeout=0)
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            box.put_archive("/w", tar_of(**{f"f{number}": b"x" * 1000}))
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(unpacked(box.get_archive("/w")[0])) == 7
    box.start()
    assert box.exec_run(["ls", "/w"]).output.split() == [b"f%d" % number for number in range(6)]
