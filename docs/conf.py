"""The documentation site: sphinx-build -W -b html docs build/docs (pip install -e ".[docs]")."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from vistok._version import __version__  # noqa: E402

project, author, release = "vistok", "The vistok contributors", __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["README.md", "curves/README.md", "differences", "images"]

nb_execution_mode = "off"  # the tests execute them
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
# Files outside of this folder, which the README and the pages name.

autodoc_typehints = "none"  # signatures have them
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app) -> None:
    from pages import write_pages

    app.connect("builder-inited", lambda app: write_pages(HERE / "generated"))
