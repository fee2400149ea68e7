"""The site: ``make docs`` builds it into build/site from the pages beside this file and from the docstrings."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import hem_ext

project = html_title = "hem_ext"
release = hem_ext.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

# Of a docstring, what stands in single backticks is a name.
default_role = "code"
napoleon_use_param = False  # else "margin, weight: ..." would be a weight of type margin
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 80
# Names of other projects are not looked up: nothing is fetched.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!hem_ext\.).*")]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"  # no font and no script from elsewhere
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = html_copy_source = False
html_math_renderer = "mathml"


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (_formula, None), (_formulas, None))


# Browsers show MathML by themselves.
def _formula(self: Any, node: nodes.math) -> None:
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def _formulas(self: Any, node: nodes.math_block) -> None:
    """One below the other where \\qquad parts them, for a line of all would not fit into a narrow window."""
    lines = [convert(part, display="block") for part in node.astext().split(r"\qquad")]
    self.body.append(f'<div class="formulas">{"".join(lines)}</div>')
    raise nodes.SkipNode
