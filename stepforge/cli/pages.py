"""Pages: self-contained HTML files from templates, with one style sheet."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

__all__ = ["render_page"]


def render_page(package: str, **values: Any) -> str:
    """Return the page that a package's ``page.html`` describes, as text.

    Args:
        package: the package; the template is the file ``page.html`` in it.
        values: the values of the template. ``style`` is the style sheet of all pages.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = files(package).joinpath("page.html").read_text(encoding="utf-8")
    style = files("stepforge.cli").joinpath("page.css").read_text(encoding="utf-8")
    return environment.from_string(template).render(style=style, **values)
