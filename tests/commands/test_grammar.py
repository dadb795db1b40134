"""Command lines as docker takes and refuses them; no engine is opened by a line that cannot be meant."""

from __future__ import annotations

from typing import Any

import click
import pytest

from labkernel.commands.grammar import invoke
from labkernel.commands.host import Host
from labkernel.commands.tree import CONTAINER_ROOT, ENTRIES, LAB_ROOT, ROOT
from labkernel.errors import LabkernelError, UsageError


class Recorder:
    """Stands for the engine's services: notes the calls, since only parsing is looked at here."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return _Path(self, name)


class _Path:
    def __init__(self, recorder: Recorder, path: str) -> None:
        self._recorder, self._path = recorder, path

    def __getattr__(self, name: str) -> Any:
        return _Path(self._recorder, f"{self._path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._recorder.calls.append((self._path, args, kwargs))
        raise LabkernelError("recorded")


class QuietHost(Host):
    def __init__(self, *, notebook: bool = False) -> None:
        self.recorder = Recorder()
        self.lines: list[str] = []
        super().__init__(lambda: self.recorder)  # type: ignore[arg-type,return-value]
        self.notebook = notebook

    def line(self, text: str = "") -> None:
        self.lines.append(text)

    warn = note = line

    def write(self, stream: str, data: bytes) -> None:
        self.lines.append(data.decode())

    def live(self) -> Any:
        raise AssertionError("nothing is drawn before an engine was asked")

    build_progress = live

    def error(self, err: LabkernelError) -> None:
        self.lines.append(err.brief)


def recorded(line: str, root: Any = ROOT) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    import shlex

    host = QuietHost()
    with pytest.raises(LabkernelError, match="recorded"):
        invoke(root, shlex.split(line), host, "labkernel")
    name, args, settings = host.recorder.calls[-1]
    settings.pop("notify", None)  # how the host is told of a stand-in image; not from the line
    return name, args, settings


def refused(line: str, root: Any = ROOT) -> LabkernelError:
    host = QuietHost()
    with pytest.raises(LabkernelError) as caught:
        invoke(root, line.split(), host, "labkernel")
    assert host.recorder.calls == [], "an engine was asked although the line cannot be meant"
    return caught.value


@pytest.mark.parametrize(
    ("line", "brief", "exit_code"),
    [
        ("run --frob busybox", "unknown flag: --frob", 125),
        ("ps -x", "unknown shorthand flag: 'x' in -x", 125),
        ("run -m", "flag needs an argument: -m", 125),
        ("run", "'labkernel run' requires at least 1 argument", 1),
        ("rm", "'labkernel rm' requires at least 1 argument", 1),
        ("tag a", "'labkernel tag' requires 2 arguments", 1),
        ("tag a b c", "'labkernel tag' requires 2 arguments", 1),
        ("ps extra", "'labkernel ps' accepts no arguments", 1),
        ("frobnicate", "unknown command: labkernel frobnicate", 1),
        ("container frob", "unknown command: labkernel container frob", 1),
        ("run --ip6 fd00::5 busybox", "--ip6: not in this release of labkernel", 125),
        ("run -p 80:90:70:60 busybox", "invalid publish opts format: 80:90:70:60", 125),
        ("run --gpus all busybox", "--gpus: not in this release of labkernel", 125),
        ("run --cpus lots busybox", 'invalid argument "lots" for "--cpus" flag: not a decimal', 125),
        ("run --restart sometimes busybox", "invalid restart policy: sometimes", 125),
        ("run --ulimit nofile=x busybox", "invalid ulimit argument: nofile=x", 125),
        ("run --mount type=frob,dst=/x busybox", 'invalid mount config for type "frob": mount type unknown', 125),
        ("run --mount type=bind,src=/tmp busybox", '"--mount" flag: target is required', 125),
        ("run --mount type=bind,src=/tmp,dst=/x,frob=1 busybox", "unexpected key 'frob' in 'frob=1'", 125),
        ("run --mount type=bind,src=/tmp,dst=/x,ro=maybe busybox", "invalid value for ro: maybe", 125),
        ("run --mount type=bind,src=/tmp,dst=/x,volume-nocopy busybox", "cannot mix 'volume-*' options", 125),
        ("run --mount type=tmpfs,dst=/x,src=y busybox", "field Source must not be specified", 125),
        ("run --rm --restart always busybox", "cannot specify both --restart and --rm", 125),
        ("run -a frob busybox", "valid streams are stdin, stdout and stderr", 125),
        ("run -d -a stdout busybox", "cannot specify both --attach and --detach", 125),
        ("run -l =x busybox", "invalid label '=x': empty name", 125),
        ("ps --filter name", 'invalid argument "name" for "-f, --filter" flag: bad format of filter', 125),
        ("stop -t soon web", "'soon' is not a valid integer", 125),
        ("build no-such-folder", "unable to prepare context: path 'no-such-folder' not found", 1),
    ],
)
def test_refused_lines(line: str, brief: str, exit_code: int) -> None:
    err = refused(line)
    assert brief in err.brief
    assert err.exit_code == exit_code
    assert err.resolution or exit_code == 1 or "build" in line or "filter" in line


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("imges", "did you mean `images`?"),
        ("run --memry 5m x", "did you mean `--memory`?"),
        ("run --frob x", "See 'labkernel run --help'."),
        ("container stpo x", "did you mean `stop`?"),
    ],
)
def test_says_what_was_meant(line: str, hint: str) -> None:
    assert hint in (refused(line).resolution or "")


def test_everything_after_the_image_is_the_command() -> None:
    name, args, _ = recorded("run --rm busybox sh -c 'echo --rm' --name x -it")
    assert name == "containers.create"
    assert args == ("busybox", ["sh", "-c", "echo --rm", "--name", "x", "-it"])


def test_flags_become_the_settings_of_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PASSED_ON", "yes")
    monkeypatch.delenv("NOT_THERE", raising=False)
    line = (
        "create --name web -e A=1 -e PASSED_ON -e NOT_THERE -m 64m --cpus 0.5 --pids-limit 9 --read-only -w /w -u 1:2"
        " --tmpfs /t:size=1m -v data:/d:ro --cap-drop ALL --cap-add CHOWN --network none --init -h box -l k=v"
        " --entrypoint sh --restart on-failure:3 --ulimit nofile=5:6 --mount type=tmpfs,dst=/u --stop-signal TERM"
        " --add-host db:10.0.0.9 -p 127.0.0.1:8080:80 --rm=false --security-opt no-new-privileges busybox true"
    )
    name, args, settings = recorded(line)
    assert (name, args) == ("containers.create", ("busybox", ["true"]))
    assert settings == {
        "name": "web",
        "environment": {"A": "1", "PASSED_ON": "yes", "NOT_THERE": None},
        "mem_limit": "64m",
        "nano_cpus": 500_000_000,
        "pids_limit": 9,
        "read_only": True,
        "working_dir": "/w",
        "user": "1:2",
        "tmpfs": {"/t": "size=1m", "/u": ""},
        "volumes": ["data:/d:ro"],
        "cap_drop": ["ALL"],
        "cap_add": ["CHOWN"],
        "network_mode": "none",
        "init": True,
        "hostname": "box",
        "labels": {"k": "v"},
        "entrypoint": ["sh"],
        "restart_policy": {"Name": "on-failure", "MaximumRetryCount": 3},
        "ulimits": [{"Name": "nofile", "Soft": 5, "Hard": 6}],
        "stop_signal": "TERM",
        "extra_hosts": ["db:10.0.0.9"],
        "ports": {"80/tcp": ("127.0.0.1", 8080)},
        "security_opt": ["no-new-privileges"],
        "auto_remove": False,
    }


def test_no_flags_no_settings() -> None:
    _, args, settings = recorded("run busybox")
    assert args == ("busybox", None)
    assert settings == {"auto_remove": False}


@pytest.mark.parametrize("line", ["run --rm=true busybox", "run --rm busybox", "run --rm=1 busybox x --rm=false"])
def test_flags_with_values(line: str) -> None:
    assert recorded(line)[2]["auto_remove"] is True


def test_short_flags_together() -> None:
    host = QuietHost()
    with pytest.raises(UsageError, match="not a TTY"):
        invoke(ROOT, ["run", "-it", "busybox"], host, "labkernel")


@pytest.mark.parametrize(
    "line",
    ["container ls", "container ps", "container list", "ps", "image ls", "images", "volume ls", "system info", "info"],
)
def test_groups_and_top_level_are_the_same_commands(line: str) -> None:
    assert recorded(line)[0] in ("containers.list", "images.list", "volumes.list")


def test_magic_roots_take_the_words_of_group_and_top_level() -> None:
    assert recorded("ls -a", CONTAINER_ROOT)[2]["all"] is True
    assert recorded("images", CONTAINER_ROOT)[0] == "images.list"
    assert recorded("doctor", LAB_ROOT)[0] == "doctor"


def test_env_file_and_label_file(tmp_path: Any) -> None:
    (tmp_path / "env").write_text("# a comment\nA=1\n\nB=two words\nNOT_THERE\n")
    _, _, settings = recorded(f"create --env-file {tmp_path}/env -e A=2 busybox")
    assert settings["environment"] == {"A": "2", "B": "two words"}
    assert "no such file" in refused(f"create --env-file {tmp_path}/none busybox").brief.lower()


def test_compare_takes_flags_before_and_after_the_image() -> None:
    for line in ("compare -n 3 hello -- sh -c 'x -n'", "compare hello -n 3 -- sh -c 'x -n'"):
        name, args, settings = recorded(line)
        assert name == "comparisons.compare"
        assert args == ("hello", ["sh", "-c", "x -n"])
        assert settings["runs"] == 3


def test_compare_wants_the_command_behind_dashes() -> None:
    assert "comes after `--`" in refused("compare hello -n 3 true").brief


@pytest.mark.parametrize("name", sorted(ENTRIES))
def test_every_command_has_help(name: str) -> None:
    host = QuietHost()
    assert invoke(ROOT, [name, "--help"], host, "labkernel") is None
    assert host.recorder.calls == []


def test_help_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    invoke(ROOT, ["--help"], QuietHost(), "labkernel")
    text = capsys.readouterr().out
    assert "Common Commands:" in text
    assert "Management Commands:" in text
    assert " network " in text


def test_a_command_that_has_said_all_may_end_with_a_status() -> None:
    @click.command()
    @click.argument("status", type=int)
    def ending(status: int) -> None:
        raise click.exceptions.Exit(status)

    value = invoke(ending, ["3"], QuietHost(), "lab")
    assert (value.exit_code, str(value)) == (3, "")
    assert invoke(ending, ["0"], QuietHost(), "lab") is None
