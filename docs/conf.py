"""How the documentation is built; ``scripts/docs`` builds it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from streammerge.version import VERSION  # noqa: E402 - found through ROOT

project = "streammerge"
author = "The streammerge maintainers"
copyright = f"2026, {author}"  # noqa: A001 - Sphinx calls it so
version = release = VERSION

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "**/README.md"]
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False
python_display_short_literal_types = True

html_theme = "furo"
html_title = f"streammerge {VERSION}"
html_copy_source = False
html_show_sphinx = False
# Schemas are downloaded by editors under these names.
html_extra_path = ["recipe.schema.json", "reference/events.schema.json"]
