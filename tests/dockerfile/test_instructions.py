"""Typed instructions, stages, and every refusal of tests/data/dockerfile/errors.txt."""

from __future__ import annotations

from pathlib import Path

import pytest

from labkernel.dockerfile import instructions as d
from labkernel.dockerfile.durations import parse_duration_ns
from labkernel.dockerfile.graph import global_scope, parse_port, stage_dependencies, verify
from labkernel.dockerfile.mounts import Mount, parse_mount
from labkernel.errors import DockerfileError

DATA = Path(__file__).parents[1] / "data" / "dockerfile"


def refusals() -> list[tuple[str, str]]:
    text = (DATA / "errors.txt").read_text().split("\n", 1)[1]
    return [(source, verdict) for source, verdict in (case.split("=> ") for case in text.split("----\n"))]


@pytest.mark.parametrize(("source", "verdict"), refusals())
def test_refused(source: str, verdict: str) -> None:
    lines, _, message = verdict.strip().partition(": ")
    with pytest.raises(DockerfileError) as caught:
        verify(source)
    err = caught.value
    assert message in err.brief
    assert lines == (f"{err.line}" if err.end_line == err.line else f"{err.line}-{err.end_line}")
    assert "\n" not in err.brief


def only(text: str) -> d.Instruction:
    return d.stages("FROM a\n" + text)[0].commands[0]


def test_stages() -> None:
    stages = d.stages("ARG v=1\nFROM x:$v AS Base\nRUN a\nfrom --platform=$P base\nCOPY --from=BASE a b\n")
    assert [(s.index, s.name, s.base, s.platform, s.line, s.end_line) for s in stages] == [
        (0, "base", "x:$v", None, 2, 3),
        (1, None, "base", "$P", 4, 5),
    ]
    assert d.find_stage(stages, "BASE") is stages[0]
    assert d.find_stage(stages, "1") is stages[1]
    assert d.find_stage(stages, "alpine") is None


def test_dependencies_and_scope() -> None:
    program = verify("ARG n=two\nARG x=$n-x\nFROM a AS one\nFROM a AS two\nFROM $n\nRUN --mount=from=one,target=/x y\n")
    assert stage_dependencies(program) == {0: set(), 1: set(), 2: {0, 1}}
    assert global_scope(program, {"n": "3"}) == {"n": "3", "x": "3-x"}


def test_run() -> None:
    run = only("RUN --mount=type=cache,target=/$x --network=none <<EOF\nhi\nEOF\n")
    assert isinstance(run, d.Run)
    assert (run.args, run.json_form, run.network, run.line, run.end_line) == (("<<EOF",), False, "none", 2, 4)
    assert run.mounts(lambda value: value.replace("$x", "c"))[0] == Mount("cache", "/c", readonly=False)
    assert run.text.endswith("hi\nEOF")


def test_copy_and_add() -> None:
    copy = only("COPY --from=b --link --parents --exclude=a --exclude=b --chmod=u=rwX x <<F y/\nz\nF\n")
    assert isinstance(copy, d.Copy)
    assert (copy.sources, copy.dest, copy.from_, copy.link, copy.parents) == (("x",), "y/", "b", True, True)
    assert (copy.exclude, copy.chmod, copy.contents[0].text) == (("a", "b"), "u=rwX", "z\n")
    add = only('ADD --checksum=sha256:1 --unpack=false --keep-git-dir ["a b", "c"]\n')
    assert isinstance(add, d.Add)
    assert (add.sources, add.dest, add.unpack, add.keep_git_dir, add.link) == (("a b",), "c", False, True, None)


def test_reset_forms() -> None:
    for text in ("CMD []\n", "ENTRYPOINT []\n"):
        command = only(text)
        assert isinstance(command, d.CommandLine)
        assert (command.args, command.json_form) == ((), True)


def test_healthcheck() -> None:
    check = only("HEALTHCHECK --interval=1m30s --timeout=500ms --start-interval=2s --retries=3 CMD a || b\n")
    assert isinstance(check, d.Healthcheck)
    assert check.test == ("CMD-SHELL", "a || b")
    assert (check.interval_ns, check.timeout_ns, check.start_interval_ns) == (90 * 10**9, 5 * 10**8, 2 * 10**9)
    assert check.retries == 3


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [("1h", 3600 * 10**9), ("1.5s", 15 * 10**8), (".5ms", 500_000), ("0", 0), ("-1s", -(10**9))],
)
def test_duration(text: str, nanoseconds: int) -> None:
    assert parse_duration_ns(text) == nanoseconds


@pytest.mark.parametrize("text", ["", "s", "1", "1 s", "1x", ".s", "-", "9999999h"])
def test_bad_duration(text: str) -> None:
    with pytest.raises(DockerfileError):
        parse_duration_ns(text)


def test_onbuild_keeps_its_heredoc() -> None:
    onbuild = only("ONBUILD COPY <<EOF /x\nhi\nEOF\n")
    assert isinstance(onbuild, d.Onbuild)
    assert onbuild.expression == "COPY <<EOF /x\nhi\nEOF"
    again = d.onbuild_instruction(onbuild.expression)
    assert isinstance(again, d.Copy)
    assert again.contents[0].content == "hi\n"


def test_mounts() -> None:
    assert parse_mount("type=secret,id=t,env=T,required,mode=0400") == Mount(
        "secret", id="t", env="T", required=True, mode=0o400
    )
    assert parse_mount("type=tmpfs,target=/t,size=1.5m").size_bytes == 1_572_864
    assert parse_mount('"type=bind","source=a,b",rw,dst=/x') == Mount("bind", "/x", "a,b", readonly=False)


def test_ports() -> None:
    assert parse_port("80") == ["80/tcp"]
    assert parse_port("1-3/UDP") == ["1/udp", "2/udp", "3/udp"]
    for bad in ("", "x", "3-1", "80/x", "70000"):
        with pytest.raises(DockerfileError):
            parse_port(bad)
