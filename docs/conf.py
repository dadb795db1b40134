"""How `make docs` builds these pages: the guide as it stands in docs/, the course as it runs on this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from labkernel import __version__

HERE = Path(__file__).resolve().parent

project = "labkernel"
author = "the labkernel authors"
copyright = "the labkernel authors, BSD-3-Clause"
release = version = __version__

extensions = ["myst_nb"]
html_theme = "furo"
html_title = f"labkernel {__version__}"
exclude_patterns = ["_build"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
myst_heading_anchors = 3
# Links to files of the repository that are no pages.
suppress_warnings = ["myst.xref_missing"]

# The course is executed on the engine of this machine, as `make demo` does; DOCS_RUN=0 builds the pages only.
nb_execution_mode = "force" if os.environ.get("DOCS_RUN", "1") != "0" else "off"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_excludepatterns = ["course/nbgrader_config*"]

# Sphinx reads below its own folder only, so the notebooks are copied in (the copies are ignored by git).
shutil.rmtree(HERE / "course", ignore_errors=True)
(HERE / "course").mkdir()
for notebook in sorted((HERE.parent / "notebooks").glob("[0-9]*.ipynb")):
    shutil.copy(notebook, HERE / "course")
