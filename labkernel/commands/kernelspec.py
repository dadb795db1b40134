"""`kernelspec install|remove`: the Container Lab kernel in Jupyter's list of kernels."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from ..errors import UsageError
from .grammar import Entry, LabGroup, command, flag, host_of, option

NAME = "labkernel"
DISPLAY_NAME = "Container Lab"

ENTRIES = {
    "install": Entry("kernelspec:install", "Add the kernel to Jupyter"),
    "remove": Entry("kernelspec:remove", "Remove it again"),
}
kernelspec = LabGroup("kernelspec", help="The Container Lab kernel for Jupyter.", entries=ENTRIES)


def spec(python: str = sys.executable) -> dict[str, Any]:
    """kernel.json: this interpreter runs `labkernel.kernel`. Source: jupyter_client docs, "Kernel specs"."""
    return {
        "argv": [python, "-Xfrozen_modules=off", "-m", "labkernel.kernel", "-f", "{connection_file}"],
        "display_name": DISPLAY_NAME,
        "language": "python",
        "interrupt_mode": "signal",
        "metadata": {"debugger": True},
    }


@command("install", "[OPTIONS]")
@flag("--user", help="For this user, instead of the environment labkernel is in")
@option("--prefix", metavar="dir", help="Below this prefix (share/jupyter/kernels)")
@click.pass_context
def install(ctx: click.Context, *, user: bool, prefix: str | None) -> None:
    """Add the Container Lab kernel to Jupyter's list."""
    from jupyter_client.kernelspec import KernelSpecManager

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / NAME
        source.mkdir()
        (source / "kernel.json").write_text(json.dumps(spec(), indent=1) + "\n")
        where = prefix or (None if user else sys.prefix)
        try:
            target = KernelSpecManager().install_kernel_spec(str(source), NAME, user=user, prefix=where)
        except PermissionError as err:
            raise UsageError(f"cannot write {err.filename}", resolution="--user installs it for you only") from None
    host_of(ctx).line(f"installed {DISPLAY_NAME} in {target}")


@command("remove", "")
@click.pass_context
def remove(ctx: click.Context) -> None:
    """Remove the Container Lab kernel from Jupyter's list."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    try:
        target = KernelSpecManager().remove_kernel_spec(NAME)
    except NoSuchKernel:
        raise UsageError(f"no kernel called {NAME} is installed", exit_code=1) from None
    host_of(ctx).line(f"removed {target}")
