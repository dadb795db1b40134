"""Real cells: through an IPython shell in this process, and through a Jupyter kernel of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("IPython")
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell

from labkernel.engine import Engine
from labkernel.errors import ContainerExit, DockerfileError, NoSuchContainer, StartError, UsageError

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def shell(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InteractiveShell]:
    monkeypatch.setenv("LABKERNEL_ROOT", str(engine.layout.root))
    monkeypatch.setenv("LABKERNEL_RUNTIME_DIR", str(engine.layout.runtime_dir))
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance()
    shell.reset(new_session=False)
    shell.extension_manager.load_extension("labkernel")
    yield shell
    shell.extension_manager.unload_extension("labkernel")
    shell.user_ns.pop("lab", None)


def cell(shell: InteractiveShell, code: str) -> Any:
    done = shell.run_cell(code)
    done.raise_error()
    return done.result


def failing(shell: InteractiveShell, code: str) -> BaseException:
    done = shell.run_cell(code)
    assert done.error_in_exec is not None, "the cell did not fail"
    return done.error_in_exec


def test_run_streams_and_returns(shell: InteractiveShell, capfd: pytest.CaptureFixture[str]) -> None:
    result = cell(shell, "%container run --rm --network none busybox sh -c 'echo out ä; echo err >&2; exit 3'")
    seen = capfd.readouterr()
    assert "out ä\n" in seen.out
    assert "err\n" in seen.err
    assert result.exit_code == 3
    assert repr(result).startswith("exit code 3")
    assert "exit code 3" in result._repr_html_()
    assert cell(shell, "%container ps -aq") == []


def test_objects_come_back(shell: InteractiveShell, capfd: pytest.CaptureFixture[str]) -> None:
    cell(shell, "c = %container run -d --name web busybox sh -c 'echo up; sleep 300'")
    assert shell.user_ns["c"].status == "running"
    listing = cell(shell, "%container ps")
    assert [container.name for container in listing] == ["web"]
    assert "<table" in listing._repr_html_()
    assert "CONTAINER ID" in repr(listing)
    assert str(cell(shell, "%docker inspect -f {{.State.Status}} $c")) == "running"
    assert cell(shell, "i = %container inspect {c.name}\ni[0]['Name']") == "/web"
    capfd.readouterr()
    assert cell(shell, "%container exec {c} echo in   # a comment").exit_code == 0
    assert "in\n" in capfd.readouterr().out
    cell(shell, "%container logs web")
    assert "up\n" in capfd.readouterr().out
    assert cell(shell, "ids = %docker ps -q\nlen(ids)") == 1
    cell(shell, "%container kill {ids}\n%container rm {ids}")
    assert cell(shell, "%container ps -aq") == []


def test_lines_in_the_middle_show_their_value(shell: InteractiveShell, capfd: pytest.CaptureFixture[str]) -> None:
    cell(shell, "%container create --name one busybox\n%container ps -a\nx = %container ps -a\n1")
    out = capfd.readouterr().out
    assert out.count("CONTAINER ID") == 1
    assert cell(shell, "%container ps -a;") is None


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("%container run --rm busybox no-such-command", StartError, "executable file not found"),
        ("%container run --frob busybox", UsageError, "unknown flag: --frob"),
        ("%container run -it busybox", UsageError, "not a TTY"),
        ("%container run --rm --check busybox false", ContainerExit, "exit code 1"),
        ("%container rm nobody", NoSuchContainer, "No such container: nobody"),
        ("%container run 'busybox", UsageError, "no closing quotation"),
        ("%%dockerfile\nFROM busybox\nCOPPY a b\n", DockerfileError, "COPPY"),
        ("%%dockerfile\nFROM busybox\nRUN exit 9\n", DockerfileError, "exit code: 9"),
        ("%%dockerfile\nFROM busybox\nCOPY nothing.txt /\n", DockerfileError, "nothing.txt"),
    ],
)
def test_errors_have_no_traceback(
    shell: InteractiveShell, capfd: pytest.CaptureFixture[str], code: str, kind: type[BaseException], words: str
) -> None:
    err = failing(shell, code)
    seen = capfd.readouterr()
    assert isinstance(err, kind)
    assert words in str(err)
    assert "Traceback" not in seen.out + seen.err
    assert cell(shell, "%container ps -aq") == []


def test_dockerfile_errors_point_at_the_cell(shell: InteractiveShell) -> None:
    err = failing(shell, "%%dockerfile -t x\nFROM busybox\n\nCOPPY a b\n")
    assert isinstance(err, DockerfileError)
    assert err.line == 4, "as JupyterLab numbers the lines: the magic is line 1"
    assert "4 | >>> COPPY a b" in (err.details or "")


def test_a_failing_step_is_shown_in_the_cells_own_lines(shell: InteractiveShell) -> None:
    err = failing(shell, "%%dockerfile -t x\nFROM busybox\nRUN exit 3\n")
    assert (err.details or "").splitlines()[-1] == "3 | >>> RUN exit 3", "no line of its own after the last newline"
    assert "failed at line 3 of" in repr(cell(shell, "%container debug"))
    failing(shell, "%%dockerfile -t x\nFROM busybox\nCOPPY a b\n")
    assert "failed at line 3 of" in repr(cell(shell, "%container debug")), "a typing mistake since is no build"


def test_a_check_is_of_the_cells_own_lines(shell: InteractiveShell, capfd: pytest.CaptureFixture[str]) -> None:
    assert str(cell(shell, "%%dockerfile --check\nFROM busybox\nCMD a\n")) == ""
    out = capfd.readouterr().out
    assert "UndefinedVar" not in out
    assert "OS signals (line 3)" in out
    assert "3 | >>> CMD a" in out
    assert cell(shell, "%%dockerfile --check\nFROM busybox\n") is None
    assert "no warnings" in capfd.readouterr().out


def test_dockerfile_cell(shell: InteractiveShell, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hello.txt").write_text("from the notebook's folder\n")
    text = '%%dockerfile -t course/magic\nFROM busybox\nCOPY hello.txt /\nENV X="{x} $y"\nCMD cat hello.txt\n'
    built = cell(shell, text)
    assert built.image.tags == ["course/magic:latest"]
    assert built.image.config["Env"][-1] == "X={x} "
    again = cell(shell, text)
    assert all(step.cached for step in again.steps if step.text.startswith("COPY"))
    capfd.readouterr()
    cell(shell, "%container run --rm course/magic")
    assert "from the notebook's folder\n" in capfd.readouterr().out
    cell(shell, "%container rmi course/magic")


def test_values_of_python_in_a_dockerfile_cell(
    shell: InteractiveShell, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shell.user_ns["greeting"] = 'good "morning"'
    shell.user_ns["settings"] = "[a]\nb = 1\n"
    cell = "FROM lab/busybox\nARG greeting\nCOPY settings.ini /\nRUN echo $greeting > /greeting\n"
    line = f"-t values --context {tmp_path} --file greeting={{greeting}} --file settings.ini={{settings}}"
    result = shell.run_cell_magic("dockerfile", line, cell)
    assert not [warning for warning in result.warnings if "not consumed" in warning]
    capfd.readouterr()
    shell.run_line_magic("container", "run --rm values cat /greeting /settings.ini")
    assert 'good "morning"\n[a]\nb = 1\n' in capfd.readouterr().out


def test_variables_of_functions_and_the_notebook(shell: InteractiveShell) -> None:
    code = "def make(word):\n    c = %container create --name {word} busybox\n    return c\nmake('local').name"
    assert cell(shell, code) == "local"


def test_help(shell: InteractiveShell, capfd: pytest.CaptureFixture[str]) -> None:
    cell(shell, "%container run?")
    assert "Create and run a new container" in capfd.readouterr().out
    cell(shell, "%container --help")
    assert "Management Commands" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("typed", "wanted", "not_wanted"),
    [
        ("%container st", {"start", "stats", "stop"}, set()),
        ("c = %container run --me", {"--memory"}, set()),
        ("%docker image ", {"ls", "history", "push"}, {"swarm"}),
        ("%container stop w", {"web"}, set()),
        ("%container run --rm bus", {"busybox"}, set()),
        ("%vm ", {"run"}, set()),
        ("%compare --r", {"--runs"}, set()),
        ("%%dockerfile --build", {"--build-arg"}, set()),
        ("%%dockerfile -t x\nFROM busybox\nC", {"CMD", "COPY"}, set()),
        ("%%dockerfile -t x\nFROM busy", {"busybox"}, set()),
        ("%%dockerfile -t x\nFROM busybox AS one\nCOPY --from=", {"one", "busybox"}, set()),
        ("%%dockerfile -t x\nFROM busybox\nRUN --mo", {"--mount="}, set()),
        ("%%dockerfile -t x\nFROM busybox\nRUN import o", set(), {"os", "open"}),
    ],
)
def test_completion(shell: InteractiveShell, typed: str, wanted: set[str], not_wanted: set[str]) -> None:
    cell(shell, "%container create --name web busybox")
    completer = shell.Completer
    with provisionalcompleter():
        found = {item.text for item in completer.completions(typed, len(typed))}
    assert wanted <= found
    assert not not_wanted & found


def test_lab_is_there_and_opens_nothing_at_load() -> None:
    code = (
        "import time, sys\n"
        "from IPython.core.interactiveshell import InteractiveShell\n"
        "shell = InteractiveShell.instance()\n"
        "shell.run_cell('lab = 5')\n"
        "shell.extension_manager.load_extension('labkernel')\n"
        "print(shell.user_ns['lab'], 'labkernel.engine' in sys.modules, 'matplotlib' in sys.modules)\n"
        "shell.extension_manager.unload_extension('labkernel')\n"
        "del shell.user_ns['lab']\n"
        "shell.extension_manager.load_extension('labkernel')\n"
        "print(shell.user_ns['lab'])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO), "LABKERNEL_ROOT": "/nonexistent/labkernel"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines == ["5 False False", "<labkernel lab: opens when it is first used>"]


def test_lab_is_the_engine(shell: InteractiveShell, engine: Engine) -> None:
    assert cell(shell, "lab.layout.root") == engine.layout.root
    assert cell(shell, "lab.containers.run('busybox', 'echo api')") == b"api\n"


# -- a kernel of its own


class Kernel:
    """A real kernel, spoken to as a front end does."""

    def __init__(self, env: dict[str, str], cwd: Path) -> None:
        import json

        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import KernelManager

        from labkernel.commands.kernelspec import spec

        (cwd / "kernels/labkernel").mkdir(parents=True)
        (cwd / "kernels/labkernel/kernel.json").write_text(json.dumps(spec()))
        specs = KernelSpecManager(kernel_dirs=[str(cwd / "kernels")])
        self.manager = KernelManager(kernel_spec_manager=specs, kernel_name="labkernel")
        self.manager.start_kernel(env=env, cwd=str(cwd))
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def run(
        self, code: str, *, stop_at: str | None = None, presses: int = 1, lines: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """The outputs of a cell; `stop_at`: the stop button is pressed when this text was written; `lines` are typed
        when the kernel asks for them, and their prompts are among the outputs."""
        asked = self.client.execute(code, allow_stdin=lines is not None)
        prompts = []
        for line in lines or ():
            prompts.append({"type": "prompt", "text": self.client.get_stdin_msg(timeout=60)["content"]["prompt"]})
            self.client.input(line)
        outputs: list[dict[str, Any]] = prompts
        while True:
            message = self.client.get_iopub_msg(timeout=60)
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "status" and content["execution_state"] == "idle":
                return outputs
            outputs.append({"type": kind, "at": time.monotonic(), **content})
            if stop_at and stop_at in content.get("text", ""):
                stop_at = None
                for _ in range(presses):
                    self.manager.interrupt_kernel()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)


@pytest.fixture
def kernel(engine: Engine, tmp_path: Path) -> Iterator[Kernel]:
    pytest.importorskip("jupyter_client")
    env = {
        **os.environ,
        "LABKERNEL_ROOT": str(engine.layout.root),
        "LABKERNEL_RUNTIME_DIR": str(engine.layout.runtime_dir),
        "PYTHONPATH": str(REPO),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
    }
    kernel = Kernel(env, tmp_path)
    yield kernel
    kernel.close()


def text_of(outputs: list[dict[str, Any]], stream: str = "stdout") -> str:
    return "".join(o["text"] for o in outputs if o["type"] == "stream" and o["name"] == stream)


def test_kernel_has_the_magics_and_streams_live(kernel: Kernel) -> None:
    outputs = kernel.run("%container run --rm --network none busybox sh -c 'echo one; sleep 1; echo two'")
    assert text_of(outputs) == "one\ntwo\n"
    first, second = (next(o["at"] for o in outputs if o.get("text", "").startswith(w)) for w in ("one", "two"))
    assert second > first
    result = next(o for o in outputs if o["type"] == "execute_result")
    assert result["data"]["text/plain"].startswith("exit code 0")
    assert "text/html" in result["data"]


def test_stop_button_interrupts_the_command(kernel: Kernel) -> None:
    script = "trap 'echo asked to stop; exit 5' INT; echo ready; while :; do sleep 0.1; done"
    outputs = kernel.run(f'%container run --rm --network none busybox sh -c "{script}"', stop_at="ready")
    assert "asked to stop\n" in text_of(outputs)
    error = next(o for o in outputs if o["type"] == "error")
    assert error["ename"] == "Interrupted"
    assert "exit code 5" in error["evalue"]
    assert len(error["traceback"]) == 1
    assert text_of(kernel.run("print(len(lab.containers.list(all=True)))")) == "0\n"


def test_stop_button_ends_a_build(kernel: Kernel) -> None:
    code = "%%dockerfile -t stopped --progress plain\nFROM busybox\nRUN echo {}\nRUN echo ready; sleep 300\n"
    outputs = kernel.run(code.format(time.time_ns()), stop_at="ready\n")
    error = next(o for o in outputs if o["type"] == "error")
    assert error["ename"] == "Interrupted"
    assert "the build was stopped" in error["evalue"]
    assert len(error["traceback"]) == 1
    left = kernel.run("print(len(lab.containers.list(all=True)), any('stopped' in str(i) for i in lab.images.list()))")
    assert text_of(left) == "0 False\n"


@pytest.mark.parametrize("presses", [1, 2])
def test_stop_button_ends_a_command_that_does_not_listen(kernel: Kernel, presses: int) -> None:
    code = "%container run --rm --network none busybox sh -c \"trap '' INT; echo ready; sleep 300\""
    outputs = kernel.run(code, stop_at="ready", presses=presses)
    assert "exit code 137" in next(o for o in outputs if o["type"] == "error")["evalue"]
    left = kernel.run("len(lab.containers.list(all=True))")
    assert next(o for o in left if o["type"] == "execute_result")["data"]["text/plain"] == "0"
    assert text_of(kernel.run("%container run --rm --network none busybox echo goes on")) == "goes on\n"


def test_a_shell_in_a_cell_at_the_failing_step(kernel: Kernel) -> None:
    dockerfile = "FROM busybox\nWORKDIR /app\nRUN echo made > here\nENV WORD=kept\nRUN exit 3"
    kernel.run(f"%%dockerfile -t never\n{dockerfile}")
    lines = ("cat here; echo $WORD", "cd /tmp; x='two words'", "cat", "for", 'echo "$x"; no-such', "exit 5")
    outputs = kernel.run("r = %container debug", lines=lines)
    prompts = [output["text"] for output in outputs if output["type"] == "prompt"]
    assert prompts == ["/app $ ", "/app $ ", "/tmp $ ", "/tmp $ ", "/tmp $ ", "/tmp $ "]
    text = text_of(outputs)
    assert "failed at line 6 of" in text
    assert "made\nkept\n" in text
    assert "syntax error" in text, "and the shell goes on"
    assert "two words\n" in text
    assert "no-such: not found" in text
    assert "lk_status" not in text
    assert text_of(kernel.run("print(r.exit_code, len(lab.containers.list(all=True)))")) == "5 0\n"
    assert "failed at line 6 of" in repr(kernel.run("%container debug")), "nobody is there to be asked"
    stopped = kernel.run("%container debug", lines=["echo begun; sleep 600"], stop_at="begun")
    error = next(output for output in stopped if output["type"] == "error")
    assert (error["ename"], len(error["traceback"])) == ("Interrupted", 1), stopped
    assert text_of(kernel.run("print(len(lab.containers.list(all=True)))")) == "0\n"


def test_a_shell_in_a_container_from_a_cell(kernel: Kernel, shared_engine: Engine) -> None:
    id = "0" if shared_engine.driver.id_mapping == "single" else "7"
    outputs = kernel.run("r = %container run -it --rm --name web -w /etc busybox sh", lines=["pwd; tty", "exit 4"])
    assert "/etc\nnot a tty\n" in text_of(outputs)
    assert text_of(kernel.run("print(r.exit_code, len(lab.containers.list(all=True)))")) == "4 0\n"
    kernel.run("%container run -d --name web busybox sleep 600")
    outputs = kernel.run(f"%container exec -it -u {id} web sh", lines=["id -u; ps", "cd /tmp", "exit"])
    assert [output["text"] for output in outputs if output["type"] == "prompt"] == ["/ $ ", "/ $ ", "/tmp $ "]
    assert f"{id}\n" in text_of(outputs)
    stopped = kernel.run("%container exec -it web sh", lines=["echo begun; sleep 600"], stop_at="begun")
    assert next(output for output in stopped if output["type"] == "error")["ename"] == "Interrupted"
    refused = kernel.run("%container exec -it web top", lines=[])
    assert "name just a shell" in next(output for output in refused if output["type"] == "error")["traceback"][-1]
    nobody = kernel.run("%container exec -it web sh")
    assert next(output for output in nobody if output["type"] == "error")["evalue"] == "the input device is not a TTY"
    assert text_of(kernel.run("%container rm -f web")) == "web\n"


def test_errors_in_a_notebook_are_short(kernel: Kernel) -> None:
    error = next(o for o in kernel.run("%container rm nobody") if o["type"] == "error")
    assert error["ename"] == "NoSuchContainer"
    assert error["evalue"] == "No such container: nobody"
    assert len(error["traceback"]) <= 3


def test_kernelspec(tmp_path: Path) -> None:
    import json

    from labkernel.cli import TerminalHost, run

    assert run(["kernelspec", "install", "--prefix", str(tmp_path)], TerminalHost()) == 0
    spec = json.loads((tmp_path / "share/jupyter/kernels/labkernel/kernel.json").read_text())
    assert spec["display_name"] == "Container Lab"
    assert spec["argv"][-3:] == ["labkernel.kernel", "-f", "{connection_file}"]
