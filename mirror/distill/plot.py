"""Training curves as one SVG file, drawn from the log; no plotting library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _MARGIN = 640, 240, 48
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")


@dataclass(frozen=True)
class Curve:
    """One line of a plot: its name and its points (step, value)."""

    name: str
    points: tuple[tuple[float, float], ...]


def write_plot(log: Path, path: Path) -> None:
    """Draw a training log: losses while learning, coverage and tokens per round on held-out texts."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    measured = [{"step": item["step"], **item["held_out"]} for item in records if "held_out" in item]
    panels = [
        ("loss", _curves([item for item in records if "held_out" not in item], "_loss")),
        ("target's token in the top 1", _curves(measured, "_top1")),
        ("target's token in the top 8", _curves(measured, "_top8")),
        ("tokens per round", _curves(measured, "tokens_per_round")),
    ]
    drawn = [_panel(title, curves, index) for index, (title, curves) in enumerate(panels) if curves]
    size = f'width="{_WIDTH}" height="{_HEIGHT * len(panels)}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
    white = '<rect width="100%" height="100%" fill="white"/>'
    path.write_text("\n".join([head, white, *drawn, "</svg>", ""]), encoding="utf-8")


def _curves(records: Sequence[dict[str, float]], ending: str) -> list[Curve]:
    names = dict.fromkeys(name for item in records for name in item if name.endswith(ending))
    return [
        Curve(name.removesuffix(ending) or name, tuple((item["step"], item[name]) for item in records if name in item))
        for name in names
    ]


def _panel(title: str, curves: Sequence[Curve], index: int) -> str:
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    top = index * _HEIGHT + _MARGIN / 2

    def place(x: float, y: float) -> str:
        across = (x - left) / ((right - left) or 1) * (_WIDTH - 3 * _MARGIN) + _MARGIN
        down = (high - y) / ((high - low) or 1) * (_HEIGHT - _MARGIN) + top
        return f"{across:.1f},{down:.1f}"

    parts = [f'<text x="{_MARGIN}" y="{top - 6:.0f}">{escape(title)}: {low:.3g} to {high:.3g}</text>']
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        points = " ".join(place(x, y) for x, y in curve.points)
        where = f'x="{_WIDTH - 2 * _MARGIN + 4}" y="{top + 14 * (number + 1):.0f}"'
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{points}"/>')
        parts.append(f'<text {where} fill="{colour}">{escape(curve.name)}</text>')
    return "\n".join(parts)
