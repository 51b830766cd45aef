"""One picture: a line of measurements below a limit; PNG with matplotlib, otherwise SVG."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 20, 50, 70


def draw_lines(
    stem: Path, *, points: Sequence[tuple[str, float]], limit: float, title: str
) -> Path:
    """Write the picture and return its path: ``stem`` with the suffix of its format.

    Args:
        stem: Path without suffix.
        points: Label and value, from left to right.
        limit: Drawn as a dashed line.
        title: Above the picture, with the unit of the values.
    """
    if importlib.util.find_spec("matplotlib"):
        return _draw_png(Path(f"{stem}.png"), points, limit, title)
    path = Path(f"{stem}.svg")
    path.write_text(render_svg(points, limit=limit, title=title), encoding="utf-8")
    return path


def render_svg(points: Sequence[tuple[str, float]], *, limit: float, title: str) -> str:
    """Return the picture as SVG; see :func:`draw_lines`."""
    top_value = 1.15 * max([limit, *(value for _, value in points)])
    step = (_WIDTH - _LEFT - _RIGHT) / max(len(points), 1)

    def height_of(value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / top_value

    places = [
        (_LEFT + step * (index + 0.5), height_of(value)) for index, (_, value) in enumerate(points)
    ]
    right, ground, bound = _WIDTH - _RIGHT, height_of(0), height_of(limit)
    line = " ".join(f"{left:.1f},{top:.1f}" for left, top in places)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}">',
        "<style>text { font: 12px sans-serif }</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="28">{escape(title)}</text>',
        f'<path d="M{_LEFT} {_TOP}V{ground:.1f}H{right}" fill="none" stroke="#444"/>',
        f'<path d="M{_LEFT} {bound:.1f}H{right}" stroke="#b00" stroke-dasharray="6 4"/>',
        f'<text x="{_LEFT + 6}" y="{bound - 6:.1f}" fill="#b00">budget {limit:.0f}</text>',
        f'<polyline points="{line}" fill="none" stroke="#06c" stroke-width="2"/>',
    ]
    for (label, value), (left, top) in zip(points, places, strict=True):
        middle = f'x="{left:.1f}" text-anchor="middle"'
        parts += [
            f'<circle cx="{left:.1f}" cy="{top:.1f}" r="4" fill="#06c"/>',
            f'<text {middle} y="{top - 10:.1f}">{value:.0f}</text>',
            f'<text {middle} y="{ground + 20:.1f}">{escape(label)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _draw_png(path: Path, points: Sequence[tuple[str, float]], limit: float, title: str) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH / 100, _HEIGHT / 100), layout="constrained")
    axes = figure.add_subplot(title=title)
    axes.plot([label for label, _ in points], [value for _, value in points], marker="o")
    axes.axhline(limit, linestyle="--", color="tab:red", label=f"budget {limit:.0f}")
    axes.set_ylim(bottom=0)
    axes.tick_params(axis="x", rotation=15)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path
