"""The options of Sphinx for the documentation: ``make docs`` builds it into ``out/docs``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for registries.py

import registries

import snn_revplugin

project = "snn_revplugin"
author = "the snn_revplugin authors"
version = release = snn_revplugin.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
suppress_warnings = ["config.cache"]  # the tables are text, made for every build

# Pages are Markdown, readable without a build; a table of registries.py replaces ``{{ name }}``.
myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
smartquotes = False  # users type step mode 's' with straight quotes
myst_substitutions = registries.tables()

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "exclude-members": "__new__"}
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

html_theme = "furo"
html_title = "snn_revplugin"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
