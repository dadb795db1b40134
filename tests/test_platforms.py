"""Images for other machines: built without executing anything, with an interpreter of the kernel, and refused without.

The interpreter of most tests is no emulator: binfmt_misc, mounted in a user namespace of its own, hands the "foreign"
program to a static busybox, which is enough to see who ran what. Two run a program for arm64 in a real one, which
`scripts/setup peers` fetches.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from registries import OCI_INDEX, OCI_MANIFEST, MadeImage, Scripted, docker_registry, scripted

from labkernel.engine import Engine
from labkernel.errors import BuildError, DockerfileError, ImageError, ManifestError, StartError, UsageError
from labkernel.imaging.basefiles import find_busybox
from labkernel.linux import elf

FOREIGN = "s390x" if elf.host() != "s390x" else "riscv64"
"""An architecture whose programs this machine does not execute by itself."""
ARGS = "ARG TARGETPLATFORM BUILDPLATFORM TARGETARCH TARGETVARIANT TARGETOS\n"
CROSS = (
    f"FROM --platform=$BUILDPLATFORM lab/busybox AS build\n{ARGS}"
    'RUN echo "$TARGETOS/$TARGETARCH/$TARGETVARIANT on $BUILDPLATFORM" > /out\n'
    "FROM scratch\nCOPY --from=build /out /out\n"
)


def program(architecture: str = FOREIGN) -> bytes:
    """What every kernel takes for a program of that architecture, and none could execute."""
    return elf.header(architecture).ljust(4096, b"\0")


def machine_tar(path: Path, content: bytes | None = None) -> Path:
    """A root file system whose only programs are foreign."""
    content = program() if content is None else content
    with tarfile.open(path, "w") as tar:
        for name in ("bin/sh", "bin/prog"):
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def foreign(engine: Engine, tmp_path: Path) -> Iterator[str]:
    """The name of an image for another machine."""
    name = "lk-test/foreign"
    engine.images.import_tar(machine_tar(tmp_path / "root.tar"), name, platform=f"linux/{FOREIGN}")
    yield name
    engine.images.remove(name, force=True)


def in_image(engine: Engine, image: str, name: str) -> str:
    out = io.BytesIO()
    with (Path(engine.layout.tmp) / "rootfs.tar").open("w+b") as file:
        engine.images.export_rootfs(image, file)
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            member = tar.extractfile(name)
            assert member is not None
            out.write(member.read())
    os.unlink(Path(engine.layout.tmp) / "rootfs.tar")
    return out.getvalue().decode()


# -- nothing foreign is executed ---------------------------------------------------------------------------------------


def test_a_cross_build_runs_on_this_machine_and_is_for_the_other(engine: Engine) -> None:
    done = engine.builds.build(CROSS, platform=f"linux/{FOREIGN}")
    assert done.image.architecture == FOREIGN
    assert "variant" not in done.image.raw_config
    assert in_image(engine, done.image.id, "out") == f"linux/{FOREIGN}/ on linux/{elf.host()}\n"
    arm = engine.builds.build(CROSS, platform="linux/arm")
    assert (arm.image.architecture, arm.image.raw_config["variant"]) == ("arm", "v7")
    assert in_image(engine, arm.image.id, "out").startswith("linux/arm/v7 on ")
    own = engine.builds.build(CROSS)
    assert own.image.architecture == elf.host()


def test_a_stage_says_its_platform_and_hands_it_on(engine: Engine, foreign: str) -> None:
    text = f"FROM --platform=linux/{FOREIGN} {foreign} AS one\nFROM one\nCOPY Dockerfile /\n"
    done = engine.builds.build(text, files={"Dockerfile": b"x"})
    assert done.image.architecture == FOREIGN
    assert not [line for line in done.warnings if "InvalidBaseImagePlatform" in line]
    # Nothing is for no platform: BuildKit takes the target's, whatever the stage says.
    text = "FROM --platform=linux/riscv64 scratch\nCOPY Dockerfile /\n"
    assert engine.builds.build(text, files={"Dockerfile": b"x"}).image.architecture == elf.host()


def test_a_base_of_another_platform_is_used_where_none_is_asked_for(engine: Engine, foreign: str) -> None:
    done = engine.builds.build(f"FROM {foreign}\nCOPY Dockerfile /\n", files={"Dockerfile": b"x"})
    assert done.image.architecture == FOREIGN
    words = f'"linux/{FOREIGN}", expected "linux/{elf.host()}"'
    assert [line for line in done.warnings if "InvalidBaseImagePlatform" in line and words in line]
    text = f"FROM {foreign}\n"
    assert [each.rule for each in engine.builds.check(text)] == ["InvalidBaseImagePlatform"]
    assert not engine.builds.check(text, platform=f"linux/{FOREIGN}")
    with pytest.raises(BuildError, match=f"wanted linux/{elf.host()}, actual: linux/{FOREIGN}") as caught:
        engine.builds.build(f"FROM lab/busybox\nFROM {foreign}\n", platform=f"linux/{elf.host()}")
    assert caught.value.line == 2
    with pytest.raises(BuildError, match="invalid platform"):
        engine.builds.build(f"FROM --platform=a/b/c/d {foreign}\n")
    with pytest.raises(DockerfileError, match=r"empty platform value from expression \$TARGETVARIANT") as empty:
        engine.builds.build(f"FROM --platform=$TARGETVARIANT {foreign}\n", platform="linux/amd64")
    assert empty.value.line == 1
    with pytest.raises(UsageError, match="invalid platform"):
        engine.builds.build(f"FROM {foreign}\n", platform="linux/&")


def test_several_platforms_are_an_index(fresh_engine: Engine, tmp_path: Path) -> None:
    engine = fresh_engine
    (tmp_path / "Dockerfile").write_text(CROSS)
    words = ["--platform", f"linux/{elf.host()},linux/{FOREIGN}", "--platform", f"{FOREIGN}", "-t", "multi:1"]
    outputs = [f"type=oci,dest={tmp_path}/o.tar", f"type=local,dest={tmp_path}/l", f"type=tar,dest={tmp_path}/t.tar"]
    line = [*words, *(word for each in outputs for word in ("-o", each)), str(tmp_path)]
    done = labkernel(engine, "build", *line)
    assert done.returncode == 0, done.stderr
    assert f"[linux/{FOREIGN} 1 " in done.stderr
    with tarfile.open(tmp_path / "o.tar") as tar:

        def document(name: str) -> dict[str, object]:
            member = tar.extractfile(name)
            assert member is not None
            return dict(json.load(member))

        (top,) = document("index.json")["manifests"]  # type: ignore[misc]
        assert top["annotations"]["io.containerd.image.name"] == "docker.io/library/multi:1"
        inner = document("blobs/" + top["digest"].replace(":", "/"))
        assert inner["mediaType"] == OCI_INDEX
        found = [each["platform"]["architecture"] for each in inner["manifests"]]  # type: ignore[attr-defined]
    assert found == [elf.host(), FOREIGN]
    for architecture in found:
        assert (tmp_path / f"l/linux_{architecture}/out").read_text().startswith(f"linux/{architecture}/")
    with tarfile.open(tmp_path / "t.tar") as tar:
        assert {f"linux_{architecture}/out" for architecture in found} < set(tar.getnames())
    # The tag is this machine's image; the other one is found by its platform.
    assert engine.images.get("multi:1").architecture == elf.host()
    assert engine.images.resolve("multi:1", platform=f"linux/{FOREIGN}").architecture == FOREIGN
    assert engine.containers.create("multi:1", ["x"], platform=f"linux/{FOREIGN}").image.architecture == FOREIGN
    with pytest.raises(UsageError, match="does not match the specified platform: wanted linux/mips64le"):
        engine.images.resolve("multi:1", platform="linux/mips64le")
    # Another engine reads the layout, and takes what is for its machine.
    (loaded,) = engine.images.load(tmp_path / "o.tar")
    assert loaded.architecture == elf.host()
    refused = labkernel(engine, "build", *words, "-o", f"type=docker,dest={tmp_path}/d.tar", str(tmp_path))
    assert refused.returncode == 1
    assert "does not currently support exporting manifest lists" in refused.stderr


def test_several_platforms_are_pushed_as_an_index(engine: Engine, fresh_engine: Engine, tmp_path: Path) -> None:
    with docker_registry(tmp_path) as domain:
        name = f"{domain}/multi"
        done = engine.builds.build(CROSS, platform=f"linux/{FOREIGN},linux/{elf.host()}", tags=[name])
        assert engine.images.get(name).architecture == elf.host(), "the tag is for this machine whatever comes first"
        pushed = engine.pushes.push(name)
        assert engine.images.find(f"{name}@{pushed.digest}") == engine.images.get(name)
        for platform, image in done.images.items():
            pulled = fresh_engine.pulls.pull(name, platform=platform)
            assert (pulled.digest, pulled.image.id) == (pushed.digest, image.id)
        engine.images.tag(name, f"{name}:again")
        assert engine.pushes.push(f"{name}:again").digest == pushed.digest
        engine.images.remove(f"{name}:again")
        # What was built together is no image without a name while the name is there.
        engine.images.prune()
        assert engine.pushes.push(name).digest == pushed.digest
        lost = MadeImage({"x": os.urandom(8)}, architecture="riscv64")
        engine.db.remember(f"images-of:{name}:latest", [engine.images.get(name).id, {"linux/riscv64": lost.digest}])
        with pytest.raises(ImageError, match=r"the one for linux/riscv64 .* has been removed"):
            engine.pushes.push(name)
        # Built for one platform alone, or with another image under the name, it is that one.
        engine.builds.build(CROSS, platform=f"linux/{FOREIGN},linux/{elf.host()}", tags=[name])
        assert engine.pushes.push(name).digest == pushed.digest
        assert engine.builds.build(CROSS, tags=[name]).image == done.images[f"linux/{elf.host()}"]
        assert engine.pushes.push(name).digest != pushed.digest
        engine.images.tag(done.images[f"linux/{FOREIGN}"].id, name)
        assert engine.pushes.push(name).digest != pushed.digest
        with pytest.raises(ManifestError, match="does not provide the specified platform"):
            fresh_engine.pulls.pull(name, platform=f"linux/{elf.host()}")
        engine.images.remove(name)


def test_no_tag_where_one_platform_fails(engine: Engine) -> None:
    text = "FROM --platform=$BUILDPLATFORM lab/busybox\nARG TARGETARCH\n" + f'RUN [ "$TARGETARCH" != {FOREIGN} ]\n'
    with pytest.raises(BuildError, match="exit code: 1"):
        engine.builds.build(text, platform=f"linux/{elf.host()},linux/{FOREIGN}", tags=["lk-test/half"])
    assert engine.images.find("lk-test/half") is None


def labkernel(engine: Engine, *words: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
    }
    return subprocess.run(
        [sys.executable, "-m", "labkernel.cli", *words], env=env, capture_output=True, text=True, timeout=120
    )


# -- two images of one name ------------------------------------------------------------------------------------------


@pytest.fixture
def fake() -> Iterator[Scripted]:
    with scripted() as registry:
        yield registry


def hold_index(fake: Scripted) -> None:
    """`web`, for this machine and for the other one; its only file says which."""
    images = {name: MadeImage({"is": name.encode()}, architecture=name) for name in (elf.host(), FOREIGN)}
    entries = []
    for name, image in images.items():
        fake.blobs.update(image.blobs)
        fake.document(image.digest, image.manifest, OCI_MANIFEST)
        platform = {"os": "linux", "architecture": name}
        size = len(image.manifest)
        entries.append({"mediaType": OCI_MANIFEST, "digest": image.digest, "size": size, "platform": platform})
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}
    fake.document("latest", json.dumps(index).encode(), OCI_INDEX)


def test_one_name_is_pulled_for_two_platforms(fresh_engine: Engine, fake: Scripted) -> None:
    hold_index(fake)
    name = f"{fake.domain}/web"
    text = f"FROM --platform=$BUILDPLATFORM {name} AS own\nFROM {name}\nCOPY --from=own /is /own\n"
    for _ in range(2):  # the second time nothing is asked for
        done = fresh_engine.builds.build(text, platform=f"linux/{FOREIGN}")
        assert in_image(fresh_engine, done.image.id, "is") == FOREIGN
        assert in_image(fresh_engine, done.image.id, "own") == elf.host()
        assert done.image.architecture == FOREIGN
        assert fresh_engine.images.get(name).architecture == elf.host()
        fake.documents.clear()
    assert all(step.cached for step in done.steps)
    # With another image under the name, what it meant for others is forgotten.
    fresh_engine.images.tag(done.image.id, name)
    assert fresh_engine.images.find(name, platform=f"linux/{FOREIGN}") == done.image
    assert fresh_engine.images.find(name, platform=f"linux/{elf.host()}") is None


def test_a_foreign_base_takes_no_tag_from_this_machines(fresh_engine: Engine, fake: Scripted) -> None:
    hold_index(fake)
    name = f"{fake.domain}/web"
    text = f"FROM --platform=linux/{FOREIGN} {name} AS other\nFROM {name}\nCOPY --from=other /is /other\n"
    done = fresh_engine.builds.build(text)
    assert in_image(fresh_engine, done.image.id, "is") == elf.host() == fresh_engine.images.get(name).architecture
    assert in_image(fresh_engine, done.image.id, "other") == FOREIGN
    # An image that is here for another machine gives way to one of a registry.
    fresh_engine.pulls.pull(name, platform=f"linux/{FOREIGN}")
    assert fresh_engine.images.get(name).architecture == FOREIGN
    assert fresh_engine.builds.build(f"FROM {name}\nENV A=1\n").image.architecture == elf.host()


# -- executed ----------------------------------------------------------------------------------------------------------


def without_interpreter() -> None:
    from labkernel.runtime import foreign

    if any(entry.takes(elf.header(FOREIGN)) for entry in foreign.interpreters() or ()):
        pytest.skip(f"this machine has an interpreter for {FOREIGN}")


def test_without_an_interpreter_it_says_what_to_install(engine: Engine, foreign: str) -> None:
    without_interpreter()
    words = f"a program for linux/{FOREIGN} on linux/{elf.host()}"
    with pytest.raises(StartError, match=words) as caught:
        engine.containers.run(foreign, ["/bin/prog"], remove=True)
    assert caught.value.exit_code == 126
    hint = "qemu-user-static"
    assert hint in str(caught.value.resolution)
    with pytest.raises(BuildError, match=words) as failed:
        engine.builds.build(f"FROM {foreign}\nCOPY Dockerfile /\nRUN true\n", files={"Dockerfile": b"x"})
    assert (failed.value.line, failed.value.status) == (3, 126)
    assert hint in str(failed.value.resolution)
    made = engine.containers.create(foreign, ["/bin/prog"])
    assert any("does not match the detected host platform" in line for line in made.warnings)


@pytest.fixture
def confined(needs: Callable[..., None]) -> Iterator[Engine]:
    """An engine under the driver proot."""
    needs("ptrace", "proot")
    base = Path(os.environ.get("TMPDIR", "/tmp")) / f"lk-p-{os.getpid()}"
    engine = Engine.open(base / "root", runtime_dir=base / "run", driver="proot")
    yield engine
    engine.runtime.shutdown(force=True)
    engine.close()
    shutil.rmtree(base)


def test_proot_does_not_jump_into_foreign_code(
    confined: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elf, "emulator_names", lambda architecture: (f"no-qemu-{architecture}",))
    confined.images.import_tar(machine_tar(tmp_path / "root.tar"), "foreign", platform=f"linux/{FOREIGN}")
    with pytest.raises(StartError, match="for which the driver proot needs qemu-") as caught:
        confined.containers.run("foreign", ["/bin/prog"], remove=True)
    assert caught.value.exit_code == 126
    assert "apt install qemu-user-static" in str(caught.value.resolution)
    with pytest.raises(BuildError, match="for which the driver proot needs qemu-") as failed:
        confined.builds.build('FROM foreign\nRUN ["/bin/prog"]\n', platform=f"linux/{FOREIGN}")
    assert (failed.value.line, failed.value.status) == (2, 126)


def test_proot_hands_them_to_an_emulator(confined: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busybox = find_busybox()
    if busybox is None:
        pytest.skip("needs a static busybox")
    # By this name busybox prints its arguments: PRoot's for the emulator, and the program with its own.
    shutil.copy(busybox, tmp_path / "echo")
    (tmp_path / elf.emulator_names(FOREIGN)[0]).symlink_to("echo")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    confined.images.import_tar(machine_tar(tmp_path / "root.tar"), "foreign", platform=f"linux/{FOREIGN}")
    said = confined.containers.run("foreign", ["prog", "run", "it"], remove=True).decode()
    assert said.endswith("/bin/prog run it\n"), said
    lines: list[bytes] = []
    result = confined.builds.build(
        'FROM foreign\nRUN ["/bin/prog", "built"]\n',
        platform=f"linux/{FOREIGN}",
        on_step=lambda step: lines.append(step.output),
    )
    assert b"".join(lines).decode().endswith("/bin/prog built\n")
    assert result.image.architecture == FOREIGN
    exported = tmp_path / "exported.tar"
    with exported.open("wb") as file:
        confined.images.export_rootfs(result.image.id, file)
    with tarfile.open(exported) as tar:
        assert not [name for name in tar.getnames() if "host-rootfs" in name or "preload" in name]


def arm64_program(status: int) -> bytes:
    """Prints a line and ends with `status`: write(1, what lies behind the code, 6), exit_group(status); one segment
    (man 5 elf)."""
    end = struct.pack("<I", 0xD2800000 | status << 5)  # mov x0, #status
    code = (
        bytes.fromhex("200080d2e1000010c20080d2080880d2010000d4") + end + bytes.fromhex("c80b80d2010000d4") + b"arm64\n"
    )
    base, start = 0x400000, 0x78
    size = start + len(code)
    head = elf.header("arm64")[:24] + struct.pack("<QQQIHHHHHH", base + start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000) + code


@pytest.fixture
def emulator(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A real one for arm64, on PATH."""
    found = Path(sys.prefix) / "peers" / "qemu-aarch64-static"
    if elf.native("arm64") or not found.exists():
        pytest.skip("no qemu-aarch64-static: `scripts/setup peers .venv` fetches it; or arm64 is this machine's own")
    monkeypatch.setenv("PATH", f"{found.parent}:{os.environ['PATH']}")
    return found.resolve()


def test_an_emulator_executes_them_under_proot(confined: Engine, tmp_path: Path, emulator: Path) -> None:
    confined.images.import_tar(machine_tar(tmp_path / "tar", arm64_program(7)), "foreign", platform="linux/arm64")
    container = confined.containers.run("foreign", ["/bin/prog"], detach=True)
    assert container.wait()["StatusCode"] == 7
    assert container.logs() == b"arm64\n"
    with pytest.raises(BuildError, match="exit code: 7"):
        confined.builds.build('FROM foreign\nRUN ["/bin/prog"]\n', platform="linux/arm64")


_REGISTER = """
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc || exit 77
printf %s "$1" > /proc/sys/fs/binfmt_misc/register || exit 77
shift
exec "$@"
"""
_INSIDE = """
import sys
from labkernel.engine import Engine
from labkernel.runtime import foreign

tar, base, name = sys.argv[1:]
with Engine.open(base + "/root", runtime_dir=base + "/run", driver="rootless") as engine:
    try:
        found = {one.name: one for one in engine.doctor()}["foreign architectures"]
        print(found.ok, found.cause)
        engine.images.import_tar(tar, "foreign", platform=f"linux/{name}")
        print(engine.containers.run("foreign", ["/bin/prog", "run"], remove=True, network_mode="none").decode())
        text = 'FROM foreign\\nRUN ["/bin/prog", "built"]\\n'
        done = engine.builds.build(text, platform=f"linux/{name}", network="none",
                                   on_step=lambda step: sys.stdout.write(step.output.decode()))
        print(done.image.architecture)
    finally:
        engine.runtime.shutdown(force=True)
"""


def with_interpreter(interpreter: Path, architecture: str, tar: Path) -> str:
    """What a run and a build of the image print where the kernel hands such programs to `interpreter`."""
    without_interpreter()
    if not shutil.which("unshare"):
        pytest.skip("needs unshare")
    magic = elf.header(architecture)[:20]
    words = "".join(f"\\x{byte:02x}" for byte in magic)
    entry = f":lk-test:M::{words}::{interpreter}:F"
    base = Path(f"/tmp/lk-b-{os.getpid()}")
    # As root too: what is registered in a user namespace ends with it.
    line = ["unshare", "-Urm", "sh", "-c", _REGISTER, "sh", entry, sys.executable, "-c", _INSIDE]
    try:
        done = subprocess.run(
            [*line, str(tar), str(base), architecture],
            env={**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__))},
            capture_output=True,
            text=True,
            timeout=180,
        )
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if done.returncode == 77 or "unshare:" in done.stderr:
        pytest.skip(f"no binfmt_misc in a user namespace here: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_with_an_interpreter_it_runs(tmp_path: Path, shared_engine: Engine) -> None:
    busybox = find_busybox()
    if busybox is None:
        pytest.skip("needs a static busybox")
    echo = tmp_path / "echo"  # by this name busybox prints its arguments, the program's path among them
    shutil.copy(busybox, echo)
    said = with_interpreter(echo, FOREIGN, machine_tar(tmp_path / "root.tar"))
    assert said == f"True {FOREIGN} ({echo})\n/bin/prog run\n\n/bin/prog built\n{FOREIGN}\n"


def test_with_an_emulator_it_runs(tmp_path: Path, shared_engine: Engine, emulator: Path) -> None:
    said = with_interpreter(emulator, "arm64", machine_tar(tmp_path / "root.tar", arm64_program(0)))
    assert said == f"True arm64 ({emulator})\narm64\n\narm64\narm64\n"
