"""Plots as SVG, drawn here: no script, no library in the page."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Final

from sealane.testing.lab.stage import way_name

COLOURS: Final = {
    "read": "#c0392b",
    "decoded": "#e5a11b",
    "clear": "#c0392b",
    "encoded": "#e5a11b",
    "other": "#5b8c5a",
}
_GROUP_COLOURS: Final = ("#2f6f9f", "#e5a11b", "#5b8c5a", "#8d5a97", "#c0392b", "#55606d")


def figure(name: str, svg: str, caption: str) -> str:
    """A figure of the page, by its name."""
    return f'<figure id="plot-{name}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'


def stacked_bars(data: Mapping[str, Mapping[str, float]], kinds: Sequence[str]) -> str:
    """Stacked bars, lying; one row for each name."""
    width, row, left = 860, 26, 110
    most = max((sum(values.values()) for values in data.values()), default=1.0) or 1.0
    scale = (width - left - 70) / most
    shapes = []
    for number, (name, values) in enumerate(data.items()):
        y, x = number * row + 4, float(left)
        shapes.append(f'<text x="{left - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>')
        for kind in kinds:
            size = values[kind] * scale
            shapes.append(
                f'<rect x="{x:.1f}" y="{y}" width="{size:.1f}" height="{row - 8}" fill="{COLOURS[kind]}">'
                f"<title>{escape(name)}: {values[kind]:.1f} {kind}</title></rect>"
            )
            x += size
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{sum(values.values()):.0f}</text>')
    height = len(data) * row + 30
    for number, kind in enumerate(kinds):
        x = left + number * 110
        shapes.append(f'<rect x="{x}" y="{height - 18}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        shapes.append(f'<text x="{x + 18}" y="{height - 8}">{kind}</text>')
    return _svg(width, height, shapes)


def grouped_bars(data: Mapping[str, Mapping[str, float]]) -> str:
    """For each name one lying bar a group, side by side; the groups have colours of their own."""
    groups = list(dict.fromkeys(group for values in data.values() for group in values))
    width, row, left = 860, 14, 110
    most = max((value for values in data.values() for value in values.values()), default=1.0) or 1.0
    shapes, y = [], 4
    for name, values in data.items():
        shapes.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>')
        for group, value in values.items():
            size = value * (width - left - 70) / most
            colour = _GROUP_COLOURS[groups.index(group) % len(_GROUP_COLOURS)]
            shapes.append(
                f'<rect x="{left}" y="{y}" width="{size:.1f}" height="{row - 2}" fill="{colour}">'
                f"<title>{escape(name)}, {escape(group)}: {value:.0f}</title></rect>"
                f'<text x="{left + size + 6:.1f}" y="{y + 10}" font-size="10">{value:.0f}</text>'
            )
            y += row
        y += 6
    for number, group in enumerate(groups):
        x = left + number % 5 * 150
        colour = _GROUP_COLOURS[number % len(_GROUP_COLOURS)]
        shapes.append(f'<rect x="{x}" y="{y + number // 5 * 18}" width="12" height="12" fill="{colour}"/>')
        shapes.append(f'<text x="{x + 18}" y="{y + 10 + number // 5 * 18}">{escape(group)}</text>')
    return _svg(width, y + (len(groups) + 4) // 5 * 18, shapes)


def histograms(data: Mapping[str, Mapping[str, Any]]) -> str:
    """How often each byte value stands where, one row for each way."""
    width, height, shapes = 860, 130 * len(data), []
    for number, (way, found) in enumerate(data.items()):
        counts, base = found["counts"], (number + 1) * 130 - 18
        total = sum(counts) or 1
        for value, count in enumerate(counts):
            size = min(
                95.0, count / total * 256 * 12
            )  # twelve units for an even share, cut where it is eight times that
            shapes.append(
                f'<rect x="{value * 3 + 60}" y="{base - size:.1f}" width="2.6" height="{size:.1f}" fill="#2f6f9f"/>'
            )
        words = f"{way_name(way)}: index of coincidence {found['coincidence']:.4f} (noise: {1 / 256:.4f})"
        shapes.append(f'<text x="60" y="{base - 100}">{escape(words)}</text>')
        shapes.append(f'<text x="60" y="{base + 13}">0</text><text x="800" y="{base + 13}">255</text>')
    return _svg(width, height, shapes)


def _svg(width: int, height: int, shapes: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" font-size="12">{"".join(shapes)}</svg>'
    )
