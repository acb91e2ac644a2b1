"""How Sphinx builds the site: `make docs`."""

import importlib.util
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
# The checkout comes first, so that the site describes the files that it lies beside.
sys.path[:0] = [str(ROOT), str(HERE / "_ext")]

import purejaxpg  # noqa: E402

project = "purejaxpg"
author = copyright = "the authors of purejaxpg"
version = release = purejaxpg.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "chapters",
    "docstrings",
    "example_report",
    "mathematics",
    "picture",
    "reference",
    "repository",
    "sidebar",
    "unbroken",
]
exclude_patterns = ["_build", "_ext"]
html_theme = "sphinx_book_theme"
html_title = f"purejaxpg {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_domain_indices = False  # the reference lists the modules
smartquotes = False  # they would make a dash of the two hyphens before an option
highlight_language = "text"  # blocks without a language are commands, equations and listings
toc_object_entries_show_parents = "hide"
html_theme_options = {
    # Of the pages inside a section, only those of the section that the reader is in are listed.
    "collapse_navbar": True,
    "max_navbar_depth": 3,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search has its place in the sidebar
    "use_download_button": False,
    "footer_content_items": ["copyright"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# The optional libraries that this environment lacks: the modules that use them are described too.
OPTIONAL = ("brax", "craftax", "jumanji", "mujoco_playground", "navix", "optuna", "ray", "wandb")
autodoc_mock_imports = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
napoleon_use_rtype = False  # what stands before a colon in "Returns" is a name, not a type
autodoc_member_order = "bysource"
autodoc_default_options = {"exclude-members": "replace"}  # of every dataclass of flax
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
maximum_signature_line_length = 80
