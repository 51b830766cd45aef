"""A report as text for a terminal: the model, its layers, what follows from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streammerge.errors import printable
from streammerge.report.document import Report
from streammerge.report.tables import Cell, Table

_OF_SOURCE = ("norm", "relative", "unchanged", "density", "kept_norm", "carried", "aligned")
_SHOWN_NAMES = 20
"""Names in a list; the data has all."""
_SHOWN_LAYERS = 100
"""Lines of layers; the data has all."""


def render_report(report: Report) -> str:
    """Return what a terminal shows of a report."""
    document = report.document
    lines = [f"{document['method']} of {len(document['sources'])} source(s), {document['vectors']}"]
    if document["base"] is not None:
        lines.append(f"base         {document['base']}")
    lines += [f"{each['label']:<12} {each['path']}" for each in document["sources"]]
    lines += ["", *_model_lines(report), "", *_layer_lines(report)]
    copied = len(document["copied"]["name"])
    if copied or document["dropped"]:
        lines += ["", f"{copied} tensor(s) not merged, {len(document['dropped'])} dropped"]
    if report.advice:
        lines += ["", *(f"- {each['text']}" for each in report.advice)]
    return "\n".join(map(printable, lines))


def render_comparison(report: Report) -> str:
    """Return what a terminal shows of a comparison."""
    document = report.document
    lines = [f"models[0]    {document['base']}"]
    lines += [f"{each['label']:<12} {each['path']}" for each in document["sources"]]
    identical, changed = len(document["identical"]), len(document["changed"])
    lines += ["", f"{identical} tensor(s) identical, {changed} changed"]
    for name, what in (
        ("partial", "not in all models"),
        ("shapes", "of different shapes"),
        ("types", "of different types"),
    ):
        table = document[name]
        if not table["name"]:
            continue
        lines.append(f"{len(table['name'])} {what}")
        values = next(column for head, column in table.items() if head != "name")
        pairs = zip(table["name"], values, strict=True)
        lines += [f"  {each}: {_listed(value)}" for each, value in list(pairs)[:_SHOWN_NAMES]]
        if len(table["name"]) > _SHOWN_NAMES:
            lines.append(f"  and {len(table['name']) - _SHOWN_NAMES} more")
    if document["changed"]:
        lines += ["", *_model_lines(report), "", *_layer_lines(report), "", *_largest_lines(report)]
    if report.advice:
        lines += ["", *(f"- {each['text']}" for each in report.advice)]
    return "\n".join(map(printable, lines))


def _largest_lines(report: Report) -> Iterator[str]:
    model = report.table("model")
    for each in report.document["sources"]:
        number = each["number"]
        largest = _first(model, f"largest.{number}")
        if largest:
            where = (
                f"{_first(model, f'largest_in.{number}')}[{_first(model, f'largest_at.{number}')}]"
            )
            yield f"largest change of {each['label']}: {_shown(largest)} in {where}"


def _listed(values: Sequence[object]) -> str:
    return ", ".join("-" if value is None else str(value) for value in values)


def _model_lines(report: Report) -> Iterator[str]:
    model = report.table("model")
    sources = range(len(report.document["sources"]))
    if not model.get("numel"):
        yield "nothing was merged"
        return
    measures = [name for name in _OF_SOURCE if any(f"{name}.{at}" in model for at in sources)]
    yield from _aligned(
        ["", *measures],
        [
            [
                str(report.document["sources"][at]["label"]),
                *(_shown(_first(model, f"{name}.{at}")) for name in measures),
            ]
            for at in sources
        ],
    )
    for name in ("change", "conflicts", "kept_conflicts"):
        if name in model:
            yield f"{name.replace('_', ' ')}: {_shown(_first(model, name))}"
    pairs = [name for name in model if name.startswith("cosine.")]
    if pairs:
        yield ""
        yield "cosines"
        yield from _aligned(
            ["", *(str(at) for at in sources)],
            [
                [str(one), *(_shown(_cosine_of(model, one, other)) for other in sources)]
                for one in sources
            ],
        )


def _layer_lines(report: Report) -> Iterator[str]:
    table = report.table("layers")
    if not table.get("layer"):
        return
    names = [
        name
        for name in table
        if name.startswith(("relative.", "cosine.")) or name in {"change", "conflicts"}
    ][:12]
    shown = len(table["layer"][:_SHOWN_LAYERS])
    rows = [
        [str(table["layer"][at]) or "(none)", *(_shown(table[name][at]) for name in names)]
        for at in range(shown)
    ]
    yield from _aligned(["layer", *names], rows)
    if shown < len(table["layer"]):
        yield f"and {len(table['layer']) - shown} more layers"


def _cosine_of(model: Table, one: int, other: int) -> Cell:
    if one == other:
        return 1.0
    return _first(model, f"cosine.{min(one, other)}.{max(one, other)}")


def _first(table: Table, name: str) -> Cell:
    return table[name][0] if name in table else None


def _shown(cell: Cell) -> str:
    return "-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        first, *rest = (
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *rest]).rstrip()
