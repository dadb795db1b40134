"""Compiling guest/*.c. Imports nothing of ours: the build hook (hatch_build.py) loads this file by its path.

The program is static and carries the digest of its source, so that a checkout whose source has changed, or an
installation without the binary, is told apart from one that is ready.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Ubuntu's and Debian's cc link glibc statically (800 kB); musl gives 70 kB.
COMPILERS = ("musl-gcc", "cc", "gcc", "clang")
_FLAGS = ("-std=gnu11", "-Os", "-s", "-static", "-Wall", "-Wextra", "-Wno-unused-result", "-Wno-format-truncation")
_ZIG_TARGETS = {"x86_64": "x86_64-linux-musl", "aarch64": "aarch64-linux-musl"}
_TIMEOUT_S = 300


def _files(source: Path, pattern: str) -> list[Path]:
    """`source` itself, or the files in a directory."""
    return sorted(source.glob(pattern)) if source.is_dir() else [source]


def source_digest(source: Path) -> str:
    """What `is_current` looks for in a binary: 16 hex digits of `source`, a file or a directory of them."""
    digest = hashlib.sha256()
    for path in _files(source, "*.[ch]"):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def is_current(program: Path, source: Path) -> bool:
    """Whether `program` exists and was compiled from this very `source`."""
    try:
        return f"labkernel-init:{source_digest(source)}".encode() in program.read_bytes()
    except OSError:
        return False


def compilers(machine: str) -> list[list[str]]:
    """Command lines (without flags) worth trying here, best first."""
    found = [[path] for name in COMPILERS if (path := shutil.which(name))]
    if os.environ.get("CC"):
        found.insert(0, os.environ["CC"].split())
    if machine in _ZIG_TARGETS:
        try:
            import ziglang  # type: ignore[import-not-found,unused-ignore]  # noqa: F401
        except ImportError:
            pass
        else:
            found.append([sys.executable, "-m", "ziglang", "cc", f"--target={_ZIG_TARGETS[machine]}"])
    return found


def compile_init(source: Path, target: Path, machine: str) -> str | None:
    """Compile `source` (a C file, or a directory of them) to the static program `target` (renamed at the end).

    Returns None when it worked, else why not: the last compiler's words, or that there is none.
    """
    problem = "no C compiler was found"
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    for compiler in compilers(machine):
        digest = f'-DSOURCE_DIGEST="{source_digest(source)}"'
        argv = [*compiler, *_FLAGS, digest, "-o", str(partial), *map(str, _files(source, "*.c"))]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, timeout=_TIMEOUT_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as err:
            problem = f"{compiler[0]}: {err}"
            continue
        if done.returncode == 0:
            partial.chmod(0o755)
            partial.replace(target)
            return None
        problem = f"{' '.join(argv)}\n{done.stderr.strip()[-1500:]}"
    partial.unlink(missing_ok=True)
    return problem
