"""Names for the expanders of the sidebar, which screen readers would call by nothing."""

from typing import Any

from sphinx.application import Sphinx


def name_expanders(app: Sphinx, page: str, template: str, context: Any, doctree: Any) -> None:
    """Say of each expander whose pages it shows: those of the link before it."""
    made = context["generate_toctree_html"]

    def named(*arguments: Any, **options: Any) -> Any:
        tree = made(*arguments, **options)
        for expander in tree.select("summary"):
            expander["aria-label"] = f"Pages of {expander.find_previous('a').get_text()}"
        return tree

    context["generate_toctree_html"] = named


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect to Sphinx, after the theme, whose function this changes."""
    app.connect("html-page-context", name_expanders, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
