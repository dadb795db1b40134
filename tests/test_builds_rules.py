"""What BuildKit does where the Dockerfile reference is silent; each rule was seen with `docker build` of the same text
(BuildKit of Debian's docker.io, and its source where that one is older than the rule)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from building import BASE, output

from labkernel.engine import Engine
from labkernel.errors import BuildError, DockerfileError, LabkernelError, UsageError
from labkernel.oci.placing import change_mode


@pytest.fixture
def context(tmp_path: Path) -> Path:
    path = tmp_path / "context"
    (path / "d/sub").mkdir(parents=True)
    for name in ("x", "y", "d/a", "d/sub/b"):
        (path / name).write_text(name)
    (path / "d").chmod(0o1700)
    (path / "d/sub").chmod(0o2750)
    return path


def test_of_arg_and_env_the_later_one_holds(engine: Engine) -> None:
    text = BASE + (
        "ENV A=env\nARG A=arg\nENV SEEN=$A\nRUN echo $A > /a\nARG B=arg\nENV B=env\nRUN echo $B > /b\n"
        "ARG C=one D=$C-two\nENV SEEN2=$D\n"
    )
    image = engine.builds.build(text, build_args={"A": "given"}).image
    assert output(engine, image, "echo $A $SEEN $B $SEEN2; cat /a /b") == "env given env one-two\ngiven\nenv\n"
    history = [step.get("created_by") for step in image.raw_config["history"]]
    assert "RUN |2 A=given B=env /bin/sh -c echo $B > /b # labkernel" in history


def test_a_run_sees_what_the_dockerfile_says(engine: Engine) -> None:
    proxies = {"HTTP_PROXY": "http://proxy:1", "no_proxy": "local"}
    text = BASE + f"ENV FRESH={os.urandom(8).hex()}\nRUN env > /seen\nARG no_proxy\nRUN true\n"
    result = engine.builds.build(text, build_args=proxies)
    names = dict(line.partition("=")[::2] for line in output(engine, result.image, "cat /seen").splitlines())
    assert {name for name in names if "proxy" in name.lower()} == {"HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy"}
    assert names["http_proxy"] == "http://proxy:1"
    assert "HOSTNAME" not in names
    history = str(result.image.raw_config["history"])
    assert "http://proxy:1" not in history
    assert "RUN |1 no_proxy=local /bin/sh -c true" in history  # an ARG shows it
    # another proxy is the same step
    again = engine.builds.build(text, build_args={**proxies, "HTTP_PROXY": "http://other:2"})
    assert all(step.cached for step in again.steps)


@pytest.mark.usefixtures("many_ids")
def test_a_copied_directory_gives_its_content_only(engine: Engine, context: Path) -> None:
    text = BASE + (
        "COPY d /new\nCOPY --chown=5:6 --chmod=711 d /owned/deep\nCOPY --parents d/sub /with/\nCOPY d x /both/\n"
        "RUN stat -c '%n %a %u:%g' /new /new/sub /owned /owned/deep /owned/deep/sub /with/d /both /both/sub > /seen\n"
    )
    seen = output(engine, engine.builds.build(text, context=context).image, "cat /seen").splitlines()
    assert seen == [
        *("/new 755 0:0", "/new/sub 2750 0:0", "/owned 711 5:6", "/owned/deep 711 5:6", "/owned/deep/sub 711 5:6"),
        *("/with/d 1700 0:0", "/both 755 0:0", "/both/sub 2750 0:0"),
    ]


def test_links_at_the_destination_are_followed(engine: Engine, context: Path) -> None:
    text = BASE + (
        "RUN mkdir /real && echo o > /real/file\n"
        "RUN ln -s real /dir && ln -s real/file /file && ln -s real/none /dangling\n"
        "COPY x /file\nCOPY y /dangling\nCOPY x y /dir\n"
    )
    image = engine.builds.build(text, context=context).image
    assert output(engine, image, "cd /real; cat file none x y; for l in file dangling dir; do readlink /$l; done") == (
        "xyxyreal/file\nreal/none\nreal\n"
    )
    with pytest.raises(BuildError, match="more than one source file, the destination must be a directory"):
        engine.builds.build(BASE + "COPY x y /nowhere\n", context=context)
    with pytest.raises(BuildError, match="more than one source file"):
        engine.builds.build(BASE + "COPY x <<E /nowhere\nE\n", context=context)


@pytest.mark.usefixtures("many_ids")
def test_hard_links_stay_hard_links(engine: Engine, context: Path) -> None:
    (context / "d/deep").mkdir()
    os.link(context / "d/a", context / "d/deep/z")
    os.link(context / "d/a", context / "outside")
    text = (
        "FROM lab/busybox AS one\nCOPY d /new\nRUN mkdir /there\nCOPY --chown=5 d /there\nCOPY d/a outside /apart/\n"
        "FROM lab/busybox\nCOPY --from=one /new /new\nCOPY --from=one /there /there\nCOPY --from=one /apart /apart\n"
    )
    image = engine.builds.build(text, context=context).image
    assert output(engine, image, "stat -c '%h %u %n' /*/a /*/deep/z; cat /new/deep/z /there/deep/z") == (
        "1 0 /apart/a\n2 0 /new/a\n2 5 /there/a\n2 0 /new/deep/z\n2 5 /there/deep/z\nd/ad/a"
    )


def test_wildcards_may_match_nothing_where_there_is_a_directory(engine: Engine, context: Path) -> None:
    assert engine.builds.build(BASE + "COPY d/nothing* nope* x /t/\n", context=context).warnings == []
    for words in ("none/* x", "d/none/*"):
        with pytest.raises(BuildError, match="file not found in build context") as caught:
            engine.builds.build(BASE + f"COPY {words} /t/\n", context=context)
        assert "none" in caught.value.brief
    with pytest.raises(BuildError, match="does not exist in s"):
        engine.builds.build(BASE.replace("\n", " AS s\n") + "FROM scratch\nCOPY --from=s /none/* /t/\n")


def test_a_backslash_in_a_heredoc_goes_away(engine: Engine) -> None:
    text = BASE + 'ENV A=1\nCOPY <<E <<"Q" /t/\n$A \\$A \\\\ "\\q" \\\nend\nE\n$A \\$A\nQ\n'
    image = engine.builds.build(text).image
    assert output(engine, image, "cat /t/E /t/Q") == '1 $A \\ "q" \nend\n$A \\$A\n'


def test_the_command_that_is_left(engine: Engine) -> None:
    for text, command, entrypoint in (
        ("CMD\n", ["/bin/sh", "-c", ""], None),
        ("CMD []\n", None, None),
        (
            'SHELL ["/bin/ash", "-ec"]\nENTRYPOINT run  it\nCMD a b\n',
            ["/bin/ash", "-ec", "a b"],
            ["/bin/ash", "-ec", "run  it"],
        ),
        ('CMD a\nENTRYPOINT ["b"]\n', ["/bin/sh", "-c", "a"], ["b"]),
    ):
        config = engine.builds.build(BASE + text).image.config
        assert (config.get("Cmd") or None, config.get("Entrypoint") or None) == (command, entrypoint), text
    assert engine.builds.build('FROM scratch\nCMD ["x"]\n').image.config["WorkingDir"] == "/"


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("FROM scratch AS a\nCOPY --from=b /x /\nFROM a AS b\n", "circular dependency", 1),
        (
            "FROM scratch AS a\nCOPY --from=b /x /\nFROM scratch AS b\nFROM a\n",
            'copy from stage "b", it needs to be',
            2,
        ),
        ("FROM scratch AS a\nRUN --mount=from=1 x\nFROM scratch\nFROM a\n", 'mount from stage "1", it needs to be', 2),
        ("FROM scratch\nARG X\nCOPY --from=$X /x /\n", "variable expansion is not supported for --from", 3),
        ("FROM scratch\nARG --x A\n", "unknown flag: --x", 2),
        ("FROM scratch\nSTOPSIGNAL SIGTREM\n", "invalid signal: SIGTREM .did you mean SIGTERM", 2),
        ("FROM scratch\nCOPY http://host/x /\n", "source can't be a URL for COPY", 2),
        ("FROM scratch\nCOPY git@host:x.git /\n", "source can't be a git ref for COPY", 2),
    ],
)
def test_refused_before_anything_runs(engine: Engine, text: str, message: str, line: int) -> None:
    with pytest.raises(LabkernelError, match=message) as caught:
        engine.builds.build(text)
    assert isinstance(caught.value, DockerfileError)
    assert caught.value.line == line


def test_only_stages_that_are_built_count(engine: Engine) -> None:
    text = "FROM scratch AS a\nCOPY --from=b /x /\nFROM scratch AS b\nENV A=1\n"
    assert engine.builds.build(text).image.config["Env"][-1] == "A=1"


def test_the_epoch_of_an_arg(engine: Engine) -> None:
    image = engine.builds.build("ARG SOURCE_DATE_EPOCH=86400\nFROM scratch\nENV A=1\nWORKDIR /w\n").image
    assert image.raw_config["created"].startswith("1970-01-02T00:00:00")


def test_build_arguments_that_steer_the_builder(engine: Engine) -> None:
    text = BASE + "RUN --mount=type=cache,id=lk-rules,target=/c hostname > /name; ls /c > /seen; touch /c/mine\n"
    arguments = {
        "BUILDKIT_SANDBOX_HOSTNAME": "builder-7",
        "BUILDKIT_CACHE_MOUNT_NS": "one",
        "BUILDKIT_INLINE_CACHE": "1",
    }
    first = engine.builds.build(text, build_args=arguments, no_cache=True)
    assert "labkernel.cache.v0" in first.image.raw_config
    other = engine.builds.build(text, build_args={**arguments, "BUILDKIT_CACHE_MOUNT_NS": "two"}, no_cache=True)
    again = engine.builds.build(text, build_args=arguments, no_cache=True)
    for image, seen in ((first.image, ""), (other.image, ""), (again.image, "mine\n")):
        assert output(engine, image, "cat /name /seen") == f"builder-7\n{seen}"


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        ("FROM lab/busybocs\n", None, r"No such image: lab/busybocs:latest \(did you mean lab/busybox\?\)"),
        ("FROM scratch AS tools\nFROM tolls\n", None, r"\(did you mean tools\?\)"),
        ("FROM scratch\nCOPY --from=lab/busibox /x /\n", None, r"\(did you mean lab/busybox\?\)"),
        ("FROM scratch AS tools\nFROM scratch\n", "tols", r'"tols" could not be found \(did you mean tools\?\)'),
    ],
)
def test_names_that_are_nearly_right(engine: Engine, text: str, target: str | None, message: str) -> None:
    with pytest.raises(LabkernelError, match=message):
        engine.builds.build(text, target=target)


def test_a_bad_line_of_the_ignore_file_is_shown_and_not_the_dockerfile(engine: Engine, context: Path) -> None:
    (context / ".dockerignore").write_text("fine\nnot[fine\n")
    with pytest.raises(
        UsageError, match=r"error reading .dockerignore, line 2: syntax error in pattern: not\[fine"
    ) as err:
        engine.builds.build(BASE + "COPY x /\n", context=context)
    assert ">>> not[fine" in (err.value.details or "")
    assert "FROM" not in (err.value.details or "")
    with pytest.raises(UsageError, match="line 1"):
        engine.builds.check("FROM scratch\n", ignore="[")


def test_an_octal_chmod_is_that_of_the_directories_made_for_it(engine: Engine, context: Path) -> None:
    """Seen with BuildKit of Docker 28.5; its maintainers mean it so (issue 6801)."""
    text = BASE + (
        "RUN mkdir -m 750 /old\nCOPY --chmod=711 x /old/new/\nCOPY --chmod=4755 x /s/u/\nCOPY --chmod=go= x /sym/\n"
        "COPY --chmod=710 d /d\nCOPY --chmod=640 <<E /h/i/\nE\nCOPY --from=lab/busybox --chmod=701 /bin/sh /f/\n"
        "RUN stat -c '%n %a' /old /old/new /s /s/u/x /sym /sym/x /d /d/sub /h /h/i /f > /seen\n"
    )
    seen = output(engine, engine.builds.build(text, context=context).image, "cat /seen").splitlines()
    assert seen == [
        *("/old 750", "/old/new 711", "/s 755", "/s/u/x 4755", "/sym 755", "/sym/x 600"),
        *("/d 710", "/d/sub 710", "/h 640", "/h/i 640", "/f 701"),
    ]


@pytest.mark.parametrize(
    ("change", "mode"), [("o+t", 0o644), ("u+t", 0o1644), ("+t", 0o1644), ("o=t", 0o640), ("a=rw,o+t", 0o666)]
)
def test_the_sticky_bit_is_not_for_others_alone(change: str, mode: int) -> None:
    assert change_mode(change, 0o644, directory=False) == mode


def test_a_secret_that_is_not_given_is_an_empty_variable(engine: Engine) -> None:
    text = BASE + 'ENV T=mine\nRUN --mount=type=secret,id=none,env=T echo "[${T-unset}]" > /seen\n'
    assert output(engine, engine.builds.build(text).image, "cat /seen") == "[]\n"


def test_a_cache_that_begins_with_something_is_that_directory(engine: Engine) -> None:
    flags = f"type=cache,id={os.urandom(8).hex()},target=/c,from=lab/busybox,source=/tmp,mode=0700,uid=5"
    text = BASE + f"RUN --mount={flags} stat -c '%a %u' /c > /seen && stat -c '%a %u' /tmp > /there\n"
    seen, there = output(engine, engine.builds.build(text).image, "cat /seen /there").splitlines()
    assert seen == there == "1777 0"


# -- triggers that name stages -----------------------------------------------------------------------------------------


def test_a_trigger_of_an_image_takes_from_a_stage_that_nothing_else_needs(engine: Engine) -> None:
    name = f"lk-test/trigger-{os.urandom(4).hex()}"
    engine.builds.build(BASE + "ONBUILD COPY --from=made /made /here\n", tags=[name])
    try:
        text = (
            f"{BASE}RUN echo base > /base\nFROM {BASE.split()[1]} AS made\nCOPY --from=0 /base /made\n"
            f"FROM {BASE.split()[1]}\nRUN exit 7\nFROM {name}\n"
        )
        result = engine.builds.build(text)
        assert output(engine, result.image, "cat /here") == "base\n"
        assert [step.stage for step in result.steps] == ["3", "0", "0", "made", "made", "3"]
        assert {step.total for step in result.steps[-2:]} == {len(result.steps)}
        assert all(step.cached for step in engine.builds.build(text).steps)
    finally:
        engine.images.remove(name, force=True)


@pytest.mark.parametrize(
    "trigger", ["COPY --from=src /s /t", "COPY --from=0 /s /t", "RUN --mount=from=src,target=/m cp /m/s /t"]
)
def test_a_trigger_of_a_stage_takes_from_another(engine: Engine, trigger: str) -> None:
    text = f"{BASE[:-1]} AS src\nRUN echo s > /s\nFROM lab/busybox AS a\nONBUILD {trigger}\nFROM a AS b\nFROM b\n"
    assert output(engine, engine.builds.build(text).image, "cat /t") == "s\n"


def test_a_trigger_that_names_a_later_stage_is_refused(engine: Engine) -> None:
    text = f"{BASE[:-1]} AS a\nONBUILD COPY --from=late /s /s\nFROM a AS b\nFROM lab/busybox AS late\nFROM b\n"
    with pytest.raises(DockerfileError, match='"late", it needs to be defined before current stage "b"') as caught:
        engine.builds.build(text)
    assert caught.value.line == 3
