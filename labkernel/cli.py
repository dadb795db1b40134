"""The `labkernel` command: what is started in the terminal. Its host and all that can be said is in `terminal`.

What is asked most often and takes less time than loading what answers it is answered here already: a build of which
nothing has changed (building/unchanged.py), a pull of what is there (imaging/uptodate.py), an exec without a terminal
(running/shortexec.py).
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys

TYPE_CHECKING = False  # typing itself takes 8 ms to import
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from .terminal import TerminalHost, run

__all__ = ["TerminalHost", "main", "run"]


def __getattr__(name: str) -> Any:
    if name not in ("TerminalHost", "run"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import terminal

    return getattr(terminal, name)


def main() -> None:
    """The `labkernel` command."""
    # A command loads some 200 modules and ends: collecting 75 times meanwhile frees nothing and takes 10 ms.
    gc.set_threshold(100_000, 20, 20)
    code = 1
    try:
        code = _carry_out(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has left; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    except OSError as err:
        # What fails elsewhere names its file, or is an error of ours.
        if err.filename is not None or err.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        os.write(2, f"labkernel: write /dev/stdout: {os.strerror(err.errno).lower()}\n".encode())
    _leave(code)


def _leave(code: int) -> NoReturn:
    """End without taking the interpreter down piece by piece, some milliseconds for a process that is gone anyway. What
    is to be done at the end (`atexit`, so weakref.finalize and temporary directories, too) is done."""
    threads = sys.modules.get("threading")
    if threads is not None and threads.active_count() > 1:
        sys.exit(code)  # waits for the others
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            pass  # the disk is full behind it, or nobody reads it any more: told above
    os._exit(code)


def _carry_out(words: Sequence[str]) -> int:
    if words[:1] == ["build"] and not _elsewhere() and _unchanged(words[1:]):
        return 0
    if words[:1] == ["pull"] and not _elsewhere() and _up_to_date(words[1:]):
        return 0
    if words[:1] == ["exec"] and not _elsewhere():
        from . import __version__
        from .running import shortexec

        code = shortexec.carry_out(words[1:], __version__)
        if code is not None:
            return code
    from . import terminal

    if os.environ.get("_LABKERNEL_COMPLETE"):
        # `eval "$(_LABKERNEL_COMPLETE=bash_source labkernel)"` is how click gives a shell its completion.
        terminal.complete()
    terminal.end_tidily()
    host = terminal.TerminalHost(words=words)
    try:
        return terminal.run(words, host)
    finally:
        host.close()


def _elsewhere() -> bool:
    """Whether commands may be for another engine than the embedded one: see contexts.py."""
    folder = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return bool(os.environ.get("LABKERNEL_CONTEXT")) or os.path.exists(f"{folder}/labkernel/contexts.json")


def _unchanged(words: Sequence[str]) -> bool:
    """Say what `labkernel build WORDS…` would say when nothing it depends on has changed."""
    from . import __version__
    from .building.unchanged import find

    record = find(words, __version__)
    if record is None:
        return False
    mode = record["progress"]
    if mode == "tty" or (mode == "auto" and sys.stderr.isatty()):
        from .building.result import BuildStep
        from .widgets.progress import terminal_progress

        with terminal_progress(mode="tty") as progress:
            for number, total, stage, text, line, end_line, size in record["steps"]:
                progress(BuildStep(number, total, stage, text, line, end_line, "cached", size_bytes=size))
    elif mode != "quiet":
        sys.stderr.write(record["plain"])
    sys.stderr.write("".join(f"WARNING: {warning}\n" for warning in record["warnings"]))
    sys.stderr.flush()
    sys.stdout.write("".join(f"{line}\n" for line in record["lines"]))
    return True


def _up_to_date(words: Sequence[str]) -> bool:
    """Say what `labkernel pull WORDS…` would say when the image is as it is at its registry."""
    from .imaging.uptodate import find

    lines = find(words)
    if lines is None:
        return False
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return True


if __name__ == "__main__":
    main()
