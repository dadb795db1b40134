"""The "Container Lab" kernel: an IPython kernel in which the magics are there from the start.

Started by Jupyter as `python -m labkernel.kernel -f CONNECTION_FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run the kernel until it is shut down."""
    from ipykernel.kernelapp import IPKernelApp

    words = list(sys.argv[1:] if argv is None else argv)
    IPKernelApp.launch_instance([*words, "--IPKernelApp.extensions=labkernel"])


if __name__ == "__main__":
    main()
