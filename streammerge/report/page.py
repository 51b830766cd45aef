"""A report as one HTML file: no request leaves it, and nothing that a file was called can run in it.

Charts are drawn by Vega in the browser, from the numbers that the page holds, so that they follow the
width, the scheme of colours and the printer. Names stand in the page as data: packed, in base64, and put
into the document as text alone.

Memory: the page's numbers as JSON, packed, and the page itself; about twice the size of the report.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from streammerge.report.document import Report
from streammerge.report.drawing import load_script
from streammerge.report.tables import Cell

_DIGITS = 5
"""Of numbers in a page: more than anybody reads; the data has them all."""


def render_page(report: Report) -> str:
    """Return a report as a page.

    Raises:
        RecipeError: The library that draws pages is not installed.
    """
    document = report.document
    packed = base64.b64encode(zlib.compress(_data_of(document).encode())).decode()
    title = f"{document['method']} of {len(document['sources'])} sources"
    parts = {
        "title": html.escape(title),
        "style": _asset("page.css"),
        "vega": _without_ends(load_script()),
        "script": _asset("page.js"),
        # Base64 has no character that ends anything.
        "data": packed,
    }
    page = _asset("page.html")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def _asset(name: str) -> str:
    return (files("streammerge.report") / "assets" / name).read_text(encoding="utf-8")


def _without_ends(script: str) -> str:
    """Return a script in which nothing looks like the end of one."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _data_of(document: Mapping[str, Any]) -> str:
    """Return what the page shows as JSON, its numbers rounded."""
    shown = dict(document)
    shown["tables"] = {
        name: {head: _rounded(column) for head, column in table.items()}
        for name, table in document["tables"].items()
    }
    return json.dumps(shown, allow_nan=False, separators=(",", ":"))


def _rounded(column: Sequence[Cell]) -> list[Cell]:
    return [float(f"{cell:.{_DIGITS}g}") if isinstance(cell, float) else cell for cell in column]
