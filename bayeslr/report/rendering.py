"""An HTML page from its template, in the report's style."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import jinja2

from bayeslr.report.text import unbroken_numbers


def render_page(package: str, page: dict[str, Any]) -> str:
    """HTML of the template ``page.html.j2`` of a package, with everything that it shows."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["numbers"] = unbroken_numbers
    template = (files(package) / "page.html.j2").read_text(encoding="utf-8")
    css = (files("bayeslr.report") / "style.css").read_text(encoding="utf-8")
    return environment.from_string(template).render(css=css, page=page)
