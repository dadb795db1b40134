"""Builds on the real engine: layers, config, cache, stages, and what wrong steps say."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from building import BASE, build, fresh, output, store

from labkernel.building.result import BuildResult, BuildStep
from labkernel.engine import Engine
from labkernel.errors import BuildError


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context"
    (path / "src/deep").mkdir(parents=True)
    (path / "app.sh").write_text("echo from the app\n")
    (path / "app.sh").chmod(0o755)
    (path / "src/a.txt").write_text("a")
    (path / "src/b.log").write_text("b")
    (path / "src/deep/c.txt").write_text("c")
    (path / "src/link").symlink_to("a.txt")
    return path


# -- the image -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("many_ids")
def test_a_layer_per_step_and_dockers_history(engine: Engine, context: Path) -> None:
    text = (
        BASE + "LABEL who=me\nENV GREETING='hello world' B=2\nWORKDIR /app\nCOPY app.sh .\n"
        'RUN echo "$GREETING" > greeting\nRUN true\nEXPOSE 80 53/udp\nUSER 1000:1000\nVOLUME /data\n'
        'STOPSIGNAL SIGINT\nHEALTHCHECK --interval=5s CMD true\nENTRYPOINT ["sh"]\nCMD ["/app/app.sh"]\n'
    )
    result = build(engine, text, context=context, tags=["lk-test/history"])
    base = engine.images.get("lab/busybox")
    assert len(result.image.layers) == len(base.layers) + 4
    config = result.image.config
    assert config["Entrypoint"] == ["sh"]
    assert config["Cmd"] == ["/app/app.sh"]
    assert config["ExposedPorts"] == {"80/tcp": {}, "53/udp": {}}
    assert (config["User"], config["WorkingDir"], config["StopSignal"]) == ("1000:1000", "/app", "SIGINT")
    assert config["Healthcheck"] == {"Test": ["CMD-SHELL", "true"], "Interval": 5_000_000_000}
    assert config["Volumes"] == {"/data": {}}
    assert config["Labels"]["who"] == "me"
    history = [step["CreatedBy"] for step in engine.images.history("lk-test/history")][::-1]
    assert 'RUN /bin/sh -c echo "$GREETING" > greeting # labkernel' in history
    assert "COPY app.sh . # labkernel" in history
    assert 'CMD ["/app/app.sh"]' in history
    entries = result.image.raw_config["history"]
    assert sum(not entry.get("empty_layer") for entry in entries) == len(result.image.layers)
    assert engine.containers.run("lk-test/history", remove=True) == b"from the app\n"
    assert result.image.labels["who"] == "me"
    assert "layers" in repr(result)
    assert "<table" in result._repr_html_()


def test_steps_are_told_as_they_happen(engine: Engine) -> None:
    seen: list[tuple[int, str, bytes]] = []

    def note(step: BuildStep) -> None:
        seen.append((step.number, step.status, step.output))

    result = build(engine, fresh(BASE + "RUN echo out; echo err >&2\nENV A=1\n"), on_step=note)
    statuses = [status for number, status, _ in seen if number == 3]
    assert statuses[0] == "started"
    assert statuses[-1] == "done"
    assert b"".join(data for number, _, data in seen if number == 3).split() == [b"out", b"err"]
    assert [step.total for step in result.steps] == [4] * 4
    assert result.steps[2].why.startswith(("not built before", "instruction changed"))


def test_a_rebuild_is_cached_and_the_same_image(engine: Engine, context: Path) -> None:
    text = fresh(BASE + "COPY src /src\nRUN date > /date\nRUN true\nCMD true\n")
    first = build(engine, text, context=context)
    again = build(engine, text, context=context)
    assert all(step.cached for step in again.steps)
    assert again.image.id == first.image.id
    # times do not matter, content does, and the miss names the file
    os.utime(context / "src/a.txt", (1, 1))
    assert build(engine, text, context=context).image.id == first.image.id
    (context / "src/a.txt").write_text("changed")
    third = build(engine, text, context=context)
    assert third.steps[2].why == "COPY changed: src/a.txt"
    assert third.steps[3].why.startswith("follows COPY")
    assert not any(step.cached for step in third.steps[2:])
    fourth = build(engine, text, context=context, no_cache=True)
    assert {step.why for step in fourth.steps if step.layer} == {"--no-cache"}


def test_why_compares_with_the_last_build(engine: Engine, context: Path) -> None:
    text = fresh(BASE + "COPY src /src\n")
    (context / "src/b.txt").write_text("0")
    build(engine, text, context=context)
    for name in ("a.txt", "b.txt", "a.txt"):
        (context / "src" / name).write_text(f"{name} again {time.time_ns()}")
        assert build(engine, text, context=context).steps[-1].why == f"COPY changed: src/{name}"


def test_another_process_finds_the_cache(engine: Engine) -> None:
    text = fresh(BASE + "RUN echo once > /once\n")
    first = build(engine, text)
    with Engine.open(engine.layout.root, driver=engine.driver.name, runtime_dir=engine.layout.runtime_dir) as other:
        again = other.builds.build(text)
    assert again.image.id == first.image.id
    assert all(step.cached for step in again.steps)


def test_changed_args_and_instructions_say_why(engine: Engine) -> None:
    text = fresh(BASE + "ARG VERSION=1\nRUN echo $VERSION > /version\n")
    first = build(engine, text)
    assert output(engine, first.image, "cat /version") == "1\n"
    second = build(engine, text, build_args={"VERSION": "2", "UNUSED": "x"})
    assert output(engine, second.image, "cat /version") == "2\n"
    assert "ARG VERSION" in second.steps[-1].why
    assert any("UNUSED" in warning for warning in second.warnings)
    third = build(engine, text.replace("RUN echo", "RUN echo now"))
    assert third.steps[-1].why.startswith("instruction changed")


def test_steps_without_files_say_why_too(engine: Engine) -> None:
    text = fresh(BASE + "ENV A=1\nLABEL x=1\n")
    assert [step.why for step in build(engine, text).steps][1:] == [
        "not built before",
        *[f"follows {line}, which was made anew" for line in text.splitlines()[1:3]],
    ]
    assert not any(step.why for step in build(engine, text).steps)
    changed = build(engine, text.replace("x=1", "x=2")).steps
    assert [step.why for step in changed][2:] == ["", "instruction changed: it was LABEL x=1"]
    assert {step.why for step in build(engine, text, no_cache=True).steps[1:]} == {"--no-cache"}


def test_a_step_of_another_image_is_not_taken_for_an_earlier_one(engine: Engine) -> None:
    stamp = time.time_ns()
    build(engine, BASE + f"RUN echo {stamp} > /one; sleep 0\n")
    unlike = build(engine, BASE + f"RUN printf %s {stamp} | tee /etc/motd /var/motd\n")
    assert unlike.steps[-1].why == "not built before"
    alike = build(engine, BASE + f"RUN echo {stamp} > /one; sleep 0.01\n")
    assert alike.steps[-1].why == f"instruction changed: it was RUN echo {stamp} > /one; sleep 0"


def test_variables_and_scopes(engine: Engine) -> None:
    text = (
        "ARG IMAGE=busybox\nARG SHARED=global\nFROM lab/${IMAGE} AS one\nARG SHARED\nARG OWN=${SHARED}-own\n"
        'ENV PATHS=$OWN:${MISSING:-none} OWN2="a b"\nRUN echo "$SHARED/$PATHS/$OWN2" > /seen\n'
        'FROM one\nRUN echo "[$SHARED][$PATHS]" >> /seen\nWORKDIR rel\nWORKDIR ative\nRUN pwd >> /seen\n'
    )
    result = build(engine, text)
    seen = output(engine, result.image, "cat /seen")
    assert seen == "global/global-own:none/a b\n[global][global-own:none]\n/rel/ative\n"  # a stage inherits ARGs too


@pytest.mark.usefixtures("many_ids")
def test_shell_heredocs_user_and_json_form(engine: Engine) -> None:
    text = BASE + (
        "RUN echo someone:x:1234:1234::/:/bin/sh >> /etc/passwd\nUSER someone\n"
        'RUN id -u > /tmp/id\nRUN ["/bin/sh", "-c", "echo json > /tmp/j"]\n'
        "RUN <<EOF\necho first > /tmp/h\necho second >> /tmp/h\nEOF\n"
        "RUN <<EOF\n#!/bin/cat\nscript\nEOF\n"
        "RUN cat <<ONE <<TWO > /tmp/two\none\nONE\ntwo\nTWO\n"
        'SHELL ["/bin/sh", "-e", "-c"]\nRUN echo $- > /tmp/flags\n'
        "COPY <<plain <<'quoted' /files/\n$HOME and $LK\nplain\n$HOME\nquoted\n"
    )
    result = build(engine, text.replace("COPY", "ENV LK=lk\nCOPY"))
    assert output(engine, result.image, "cat /tmp/id /tmp/j /tmp/h /tmp/two") == "1234\njson\nfirst\nsecond\ntwo\n"
    assert "e" in output(engine, result.image, "cat /tmp/flags")
    assert output(engine, result.image, "cat /files/plain") == " and lk\n"
    assert output(engine, result.image, "cat /files/quoted") == "$HOME\n"
    assert output(engine, result.image, "ls /dev/pipes 2>&1 | grep -c 'No such'") == "1\n"


def test_entrypoint_resets_the_bases_command(engine: Engine) -> None:
    result = build(engine, BASE + 'ENTRYPOINT ["echo"]\n')
    assert "Cmd" not in result.image.config
    kept = build(engine, BASE + 'CMD ["x"]\nENTRYPOINT ["echo"]\n')
    assert kept.image.config["Cmd"] == ["x"]


def test_onbuild_runs_in_the_next_build(engine: Engine) -> None:
    build(engine, BASE + "ONBUILD RUN echo triggered > /t\nONBUILD ENV T=1\n", tags=["lk-test/onbuild"])
    result = build(engine, "FROM lk-test/onbuild\nRUN cat /t\n")
    assert "OnBuild" not in result.image.config
    assert output(engine, result.image, "cat /t; echo $T") == "triggered\n1\n"


def test_a_whiteout_hides_and_exports_without_the_file(engine: Engine) -> None:
    result = build(
        engine,
        BASE + "RUN mkdir -p /d /home/a && echo x > /d/gone && echo y > /d/kept\nRUN rm /d/gone && rm -r /home\n",
    )
    reading, writing = os.pipe()
    names: list[str] = []

    def read() -> None:
        with os.fdopen(reading, "rb") as file, tarfile.open(fileobj=file, mode="r|") as tar:
            names.extend(member.name for member in tar)

    thread = threading.Thread(target=read)
    thread.start()
    with os.fdopen(writing, "wb") as out:
        engine.images.export_rootfs(result.image.id, out)
    thread.join()
    assert "d/kept" in names
    assert "d/gone" not in names
    assert not any(name.startswith("home") for name in names)


# -- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("many_ids")
def test_only_needed_stages_and_copy_from(engine: Engine) -> None:
    text = (
        "FROM lab/busybox AS maker\n"
        "RUN mkdir /out && echo made > /out/file && chown 7:8 /out/file && ln -s file /out/l\n"
        "FROM lab/busybox AS broken\nRUN exit 9\n"
        "FROM scratch AS bare\nCOPY --from=maker /out/ /\nCOPY --from=0 --chown=5 /out/file /renamed\n"
        "FROM lab/busybox\nCOPY --from=bare / /from/\nCOPY --from=lab/busybox /bin/busybox /bb\n"
    )
    result = build(engine, text)
    assert {step.stage for step in result.steps} == {"maker", "bare", "3"}
    found = output(engine, result.image, "stat -c '%n %u:%g %F' /from/*; cat /from/l; test -x /bb && echo bb")
    assert found == (
        "/from/file 7:8 regular file\n/from/l 0:0 symbolic link\n/from/renamed 5:5 regular file\nmade\nbb\n"
    )
    bare = build(engine, text, target="bare")
    assert len(bare.image.layers) == 2
    with pytest.raises(BuildError, match='target stage "nope" could not be found'):
        build(engine, text, target="nope")


# -- COPY and ADD ----------------------------------------------------------------------------------------------------


def listing(engine: Engine, image: Any, path: str) -> list[str]:
    return output(engine, image, f"cd {path} && find . -mindepth 1 | sort").split()


def test_copy_rules(engine: Engine, context: Path) -> None:
    text = BASE + (
        "WORKDIR /w\nCOPY src one\nCOPY src/a.txt two\nCOPY src/a.txt app.sh three/\nCOPY src/*.txt four/\n"
        "COPY src/link five\nRUN ln -s /w/one /w/alias\nCOPY app.sh alias/\nCOPY . six/\n"
        "COPY --exclude=*.log --exclude=deep src seven\n"
    )
    result = build(engine, text, context=context)
    assert listing(engine, result.image, "/w/one") == [
        "./a.txt",
        "./app.sh",
        "./b.log",
        "./deep",
        "./deep/c.txt",
        "./link",
    ]
    assert output(engine, result.image, "cat two five; ls three four; readlink one/link") == (
        "aafour:\na.txt\n\nthree:\na.txt\napp.sh\na.txt\n"
    )
    assert "./src/deep/c.txt" in listing(engine, result.image, "/w/six")
    assert listing(engine, result.image, "/w/seven") == ["./a.txt", "./link"]


@pytest.mark.usefixtures("many_ids")
def test_copy_owners_and_modes(engine: Engine, context: Path) -> None:
    text = BASE + (
        "RUN echo bob:x:4321:4321::/:/bin/sh >> /etc/passwd && echo staff2:x:99: >> /etc/group\n"
        "COPY --chown=bob src/a.txt /a\nCOPY --chown=12:staff2 src/a.txt /b\nCOPY --chown=33 src/a.txt /c\n"
        "COPY --chmod=4711 src/a.txt /d\nCOPY --chmod=u=rwX,go= src /e\n"
    )
    result = build(engine, text, context=context)
    found = output(engine, result.image, "stat -c '%n %u:%g %a' /a /b /c /d /e/a.txt /e/deep")
    assert found.splitlines()[:4] == ["/a 4321:4321 644", "/b 12:99 644", "/c 33:33 644", "/d 0:0 4711"]
    assert found.splitlines()[4:] == ["/e/a.txt 0:0 600", "/e/deep 0:0 700"]
    with pytest.raises(BuildError, match="unable to find user nobody-here"):
        build(engine, BASE + "COPY --chown=nobody-here app.sh /\n", context=context)


def test_dockerignore(engine: Engine, context: Path) -> None:
    (context / ".dockerignore").write_text("# no\n*\n!src\nsrc/deep\n!src/deep/c.txt\n**/*.log\n")
    result = build(engine, BASE + "COPY . /all\n", context=context)
    assert listing(engine, result.image, "/all") == [
        "./src",
        "./src/a.txt",
        "./src/deep",
        "./src/deep/c.txt",
        "./src/link",
    ]
    with pytest.raises(BuildError, match=r"excluded by \.dockerignore") as caught:
        build(engine, BASE + "\nCOPY app.sh /\n", context=context)
    assert (caught.value.line, caught.value.resolution) == (3, "a line of .dockerignore leaves it out")
    ours = build(engine, BASE + "COPY . /all\n", context=context, ignore="src")
    assert listing(engine, ours.image, "/all") == ["./.dockerignore", "./app.sh"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.usefixtures("many_ids")
def test_add_unpacks_archives_and_copy_does_not(engine: Engine, context: Path, mode: str) -> None:
    with tarfile.open(context / "archive", mode) as tar:
        member = tarfile.TarInfo("dir/file")
        member.size, member.uid, member.mode = 3, 17, 0o640
        tar.addfile(member, io.BytesIO(b"abc"))
    result = build(engine, BASE + "ADD archive /added/\nCOPY archive /copied/\nADD app.sh /added/\n", context=context)
    found = output(engine, result.image, "stat -c '%u %a' /added/dir/file; ls /copied /added")
    assert found == "17 640\n/added:\napp.sh\ndir\n\n/copied:\narchive\n"


def test_files_from_python_and_labels(engine: Engine) -> None:
    result = build(engine, BASE + "COPY made.py /\n", files={"made.py": b"print(1)\n"}, labels={"x": "y"})
    assert output(engine, result.image, "cat /made.py") == "print(1)\n"
    assert result.image.labels["x"] == "y"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("COPY missing /x", "stat missing: file does not exist"),
        ("COPY ../x /x", "forbidden path outside the build context"),
        ("COPY src/a.txt app.sh /x", "the destination must be a directory and end with a /"),
        ("COPY app.sh /bin/sh/x", "(?i)not a directory|non-directory"),
        ("COPY --from=lab/busybox /nothing /x", "stat /nothing: file does not exist"),
        ("ADD http://127.0.0.1:1/x /x", "failed to load http://127.0.0.1:1/x"),
        ("ADD --checksum=sha256:12 http://127.0.0.1:1/x /x", "unsupported checksum"),
        ("ADD --checksum=sha256:12 app.sh /x", "checksum can't be specified"),
        ("RUN --security=insecure true", "security.insecure is not allowed"),
        ("RUN --mount=type=cache true", "mount target is required"),
        ("RUN --mount=type=tmpfs,target=/ true", 'invalid mount target "/"'),
        ("RUN --mount=type=secret,id=token,required cat /run/secrets/token", "secret token: not found"),
        ("RUN --mount=type=ssh,required true", "unset ssh forward key default"),
        ("RUN --mount=type=bind,source=nothing,target=/m true", "stat nothing: file does not exist"),
        ("RUN --device=vendor.com/class=x,required true", 'required device "vendor.com/class=x" is not registered'),
    ],
)
def test_wrong_steps_name_their_line(engine: Engine, context: Path, line: str, words: str) -> None:
    before = store(engine)
    with pytest.raises(BuildError, match=words) as caught:
        build(engine, f"{BASE}ENV A=1\n{line}\n", context=context, tags=["lk-test/never"])
    assert caught.value.line == 3
    assert ">>> " in (caught.value.details or "")
    assert store(engine) == before


# -- again and side by side ------------------------------------------------------------------------------------------


def test_two_builds_at_once(engine: Engine) -> None:
    text = fresh(BASE + "RUN echo same > /same\nRUN echo again >> /same\n")
    results: list[BuildResult] = []
    threads = [threading.Thread(target=lambda: results.append(build(engine, text))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert {output(engine, result.image, "cat /same") for result in results} == {"same\nagain\n"}


def test_source_date_epoch_gives_the_same_image_twice(engine: Engine, context: Path) -> None:
    text = BASE + "WORKDIR /w\nCOPY src /new/dir/\nRUN touch /t && mkdir /m\n"
    build_args = {"SOURCE_DATE_EPOCH": "1700000000"}
    first = build(engine, text, context=context, build_args=build_args, no_cache=True)
    again = build(engine, text, context=context, build_args=build_args, no_cache=True)
    assert first.image.id == again.image.id


def test_a_device_that_is_not_required_may_be_missing(engine: Engine) -> None:
    result = build(engine, BASE + "RUN --device=vendor.com/class=x true\n")
    assert [warning for warning in result.warnings if "the step runs without it" in warning]


# -- without root ------------------------------------------------------------------------------------------------------

_PLAIN = """
import labkernel, sys
lab = labkernel.connect()
assert lab.driver.name == "rootless", lab.driver
text = '''FROM lab/busybox
WORKDIR /w
COPY --chown=33:44 here .
RUN mkdir -p /home/a
RUN echo made > /w/made && rm -r /home && mkdir /home && mkfifo /w/pipe
USER 0
RUN id -u
'''
first = lab.builds.build(text, context="ctx", tags=["plain"])
assert not any(step.cached for step in first.steps[1:]), first
assert all(step.cached for step in lab.builds.build(text, context="ctx").steps)
with open("out.tar", "wb") as out:
    lab.images.export_rootfs("plain", out)
print(lab.containers.run("plain", ["cat", "/w/made", "/w/here"], user="0", remove=True).decode(), end="")
lab.runtime.shutdown(force=True)
lab.close()
"""


def test_a_plain_user_builds_and_owners_are_kept(plain_user: Any) -> None:
    context = plain_user.home / "ctx"
    context.mkdir()
    (context / "here").write_text("content\n")
    context.chmod(0o755)
    done = plain_user.python("-c", _PLAIN)
    if "DriverError" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "made\ncontent\n"
    with tarfile.open(plain_user.home / "out.tar") as tar:
        members = {member.name: member for member in tar.getmembers()}
    assert (members["w/here"].uid, members["w/here"].gid) == (33, 44)
    assert members["w/pipe"].isfifo()
    assert [name for name in members if name.startswith("home")] == ["home"]


def test_building_on_the_host_as_image(engine: Engine) -> None:
    if engine.driver.name != "root":
        pytest.skip("lab/host needs the root driver")
    result = build(engine, "FROM lab/host\nWORKDIR /lk-work\nRUN echo made > file\nCOPY <<x /lk-work/copied\ntext\nx\n")
    assert output(engine, result.image, "cat /lk-work/file /lk-work/copied") == "made\ntext\n"
    assert not Path("/lk-work").exists()


# -- what the checks know of a build ---------------------------------------------------------------------------------


def test_checks_know_the_ignore_file_and_the_base(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "seen").write_text("x")
    (tmp_path / ".dockerignore").write_text("*.log\n")
    engine.builds.build("FROM lab/busybox\nENV FROM_BASE=1\n", tags=["checks-base"])
    text = "FROM checks-base\nCOPY seen *.log /x/\nENV A=$FROM_BASE B=$NOWHERE\nCOPY a.log* /y/\n"
    found = engine.builds.build(text, context=tmp_path).warnings
    assert any(warning.startswith("UndefinedVar") and "$NOWHERE" in warning for warning in found)
    assert any(
        warning.startswith("CopyIgnoredFile") for warning in engine_check(engine, "FROM scratch\nCOPY a.log /\n")
    )
    assert not any("FROM_BASE" in warning for warning in found)


def engine_check(engine: Engine, text: str) -> list[str]:
    return [finding.short() for finding in engine.builds.check(text, ignore="*.log\n")]


def test_a_base_of_another_platform_is_told(engine: Engine) -> None:
    image = engine.images.resolve("lab/busybox", notify=lambda line: None)
    document = {**image.raw_config, "architecture": "s390x"}
    engine.images.commit_layers(document, image.layers, ["foreign-base"])
    found = engine.builds.build("FROM foreign-base\nENV A=1\n").warnings
    assert [w for w in found if w.startswith("InvalidBaseImagePlatform: Base image foreign-base was pulled with")]
    assert not engine.builds.build("# check=skip=InvalidBaseImagePlatform\nFROM foreign-base\nENV A=1\n").warnings


def test_exports_of_two_builds_are_bit_identical(engine: Engine, tmp_path: Path) -> None:
    """SOURCE_DATE_EPOCH reaches the unpacked files, too, from which `--output type=tar` is made."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("x")
    text = "FROM lab/busybox\nCOPY tree /tree\nCOPY tree/file /app/\nRUN mkdir /made && ln -s a /made/l\n"
    tars = []
    for _ in range(2):
        image = engine.builds.build(
            text, context=tmp_path, no_cache=True, build_args={"SOURCE_DATE_EPOCH": "1500000000"}
        ).image
        with (tmp_path / "out.tar").open("wb") as file:
            engine.images.export_rootfs(image.id, file)
        tars.append((tmp_path / "out.tar").read_bytes())
        os.utime(tmp_path / "tree/file")
    assert tars[0] == tars[1]
    with tarfile.open(fileobj=io.BytesIO(tars[0])) as tar:
        made = [tar.getmember(name.strip("/")) for name in ("tree", "tree/file", "app", "app/file", "made", "made/l")]
        assert {member.mtime for member in made} == {1_500_000_000}


def test_files_beside_a_directory(engine: Engine, tmp_path: Path) -> None:
    """They go over the directory's; nothing else of it is read, whatever lies there."""
    (tmp_path / "one").write_text("of the directory")
    (tmp_path / "both").write_text("of the directory")
    os.mkfifo(tmp_path / "unreadable")
    (tmp_path / ".dockerignore").write_text("unreadable\n")
    files = {"both": b"given", "sub/new": b"given"}
    text = BASE + (
        "COPY . /all/\nCOPY one both sub/new /named/\nCOPY b* /wild/\n"
        "RUN --mount=source=sub/new,target=/m cat /m /all/both /all/one /all/sub/new /named/new /wild/both > /seen\n"
    )
    result = build(engine, text, context=tmp_path, files=files)
    assert output(engine, result.image, "cat /seen") == "givengivenof the directorygivengivengiven"
    again = build(engine, text, context=tmp_path, files=files)
    assert all(step.cached for step in again.steps)
    changed = build(engine, text, context=tmp_path, files={**files, "both": b"other"})
    assert [step.cached for step in changed.steps][1:4] == [False, False, False]
    with pytest.raises(BuildError, match="file not found in build context"):
        build(engine, BASE + "COPY absent /\n", context=tmp_path, files=files)
