"""A few rounds of several modes under each other on one time axis, as one SVG file.

    mirror run BUNDLE PROMPT --mode plain --trace plain.json        (and serial, mirror)
    python -m mirror.bench.timeline plain.json serial.json mirror.json -o timeline.svg

Reads the traces of `mirror run --trace` alone. Every mode starts at zero with the same round; the time
shown is that of a few rounds of the mode whose rounds are longest, so what stands in one column took place
after the same time, and the tokens at the right were made in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import click

_WIDTH, _LEFT, _RIGHT = 960, 150, 850
_HEAD, _ROW, _BAR, _GAP = 34, 32, 26, 22  # pixels: a panel's title, a row, a bar in it, between panels
_DOT, _DOT_STEP = 3.2, 8.5  # a token's radius, and from one token to the next
_INK, _GREY, _LINE, _TOKEN = "#1b1f24", "#57606a", "#d0d7de", "#2da44e"
_ROUNDS_ROW = 0  # the trace's row of whole rounds
# Work by the target is blue, by the draft orange, waiting is hatched.
_COLOURS = {
    "prefix": "#9cc5f3",
    "exit_head": "#c9def5",
    "suffix": "#5f9fe6",
    "verify": "#4a6f99",
    "trunk": "#f6d08f",
    "rollout": "#efa93a",
    "propose": "#d97b21",
    "draft_prefill": "#f6e7cf",
}
_WAITS = ("rollout_wait", "redraft", "candidate_wait", "draft_prefill_wait")
_SAYINGS = {
    "plain": "one token for each pass of the target",
    "serial": "the draft proposes while the target stands still, then the target verifies",
    "mirror": "while the target verifies, the draft goes on from every likely outcome",
}


@dataclass(frozen=True)
class Bar:
    """One span in a row of a trace, in ms from the panel's zero."""

    row: int
    name: str
    start_ms: float
    end_ms: float


@dataclass(frozen=True)
class RoundMark:
    """When a round ended, in ms from the panel's zero, and how many tokens it committed."""

    start_ms: float
    end_ms: float
    committed: int
    reused: bool | None


@dataclass(frozen=True)
class Panel:
    """What one trace shows: its mode, the titles of its rows, bars and rounds from one round on."""

    mode: str
    rows: Mapping[int, str]
    bars: tuple[Bar, ...]
    rounds: tuple[RoundMark, ...]

    @property
    def speed(self) -> float:
        """Tokens per ms over all rounds."""
        return sum(item.committed for item in self.rounds) / (self.rounds[-1].end_ms - self.rounds[0].start_ms)

    def tokens(self, until_ms: float) -> int:
        """Return how many tokens were committed by a time."""
        return sum(item.committed for item in self.rounds if item.end_ms <= until_ms)


@click.command()
@click.argument("traces", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--skip", default=4, type=click.IntRange(min=0), help="Rounds left out at the beginning.")
@click.option("--rounds", default=3, type=click.IntRange(min=1), help="Rounds shown of the mode with the longest.")
@click.option("--title", default="A few rounds, all modes from the same zero", help="Above the picture.")
def main(traces: tuple[Path, ...], output: Path, skip: int, rounds: int, title: str) -> None:
    """Draw TRACES under each other."""
    panels = []
    for path in traces:
        panel = read_panel(json.loads(path.read_text(encoding="utf-8")), skip)
        if len(panel.rounds) < rounds:
            raise click.ClickException(
                f"{path} has {len(panel.rounds)} rounds after the first {skip}, {rounds} are wanted; "
                "make a longer answer, or pass a smaller --skip or --rounds"
            )
        panels.append(panel)
    output.write_text(draw(panels, rounds, title), encoding="utf-8")
    for panel in panels:
        shown_ms = _shown_ms(panels, rounds)
        click.echo(f"{panel.mode}: {panel.tokens(shown_ms)} tokens in {shown_ms:.1f} ms")


def read_panel(trace: Mapping[str, Any], skip: int) -> Panel:
    """Return what a trace holds from round `skip` on, that round's start being zero."""
    events = trace["traceEvents"]
    titles = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    whole = [event for event in events if event["ph"] == "X" and event["tid"] == _ROUNDS_ROW]
    spans = [event for event in events if event["ph"] == "X" and event["tid"] != _ROUNDS_ROW]
    shown = whole[skip:]
    zero_us = shown[0]["ts"] if shown else 0.0
    bars = tuple(
        Bar(event["tid"], event["name"], (event["ts"] - zero_us) / 1e3, (event["ts"] + event["dur"] - zero_us) / 1e3)
        for event in spans
        if event["ts"] + event["dur"] > zero_us
    )
    rounds = tuple(
        RoundMark(
            (event["ts"] - zero_us) / 1e3,
            (event["ts"] + event["dur"] - zero_us) / 1e3,
            event["args"]["committed"],
            event["args"]["reused"],
        )
        for event in shown
    )
    used = {bar.row for bar in bars}
    rows = {row: title for row, title in titles.items() if row in used}
    return Panel(shown[0]["args"]["mode"] if shown else "no rounds", rows, bars, rounds)


def draw(panels: Sequence[Panel], rounds: int, title: str) -> str:
    """Return the SVG of several panels on one time axis; speeds beside the tokens are over the first panel's.

    Args:
        rounds: how many rounds of the panel with the longest ones fill the axis.
    """
    shown_ms, top = _shown_ms(panels, rounds), 52
    bottom = top + sum(_height(panel) for panel in panels)
    parts = [f'<text x="24" y="32" font-size="17" font-weight="600" fill="{_INK}">{escape(title)}</text>']
    parts += _axis(top, bottom, shown_ms)
    for panel in panels:
        parts += _panel(panel, panels[0], top, shown_ms)
        top += _height(panel)
    height = bottom + 84
    parts += _legend(bottom + 46, {bar.name for panel in panels for bar in panel.bars if bar.start_ms < shown_ms})
    label = escape(f"{title}: " + ", ".join(f"{p.mode} {p.tokens(shown_ms)} tokens" for p in panels), {'"': "&quot;"})
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="Segoe UI, Helvetica, Arial, sans-serif" role="img" aria-label="{label}">'
    )
    hatch = (
        '<defs><pattern id="wait" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        f'<rect width="6" height="6" fill="#ffffff"/><rect width="2" height="6" fill="{_LINE}"/></pattern></defs>'
    )
    ground = f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, hatch, ground, *parts, "</svg>", ""])


def _shown_ms(panels: Sequence[Panel], rounds: int) -> float:
    return max(panel.rounds[rounds - 1].end_ms for panel in panels)


def _height(panel: Panel) -> int:
    return _HEAD + _ROW * (len(panel.rows) + 1) + _GAP


def _panel(panel: Panel, first: Panel, top: int, shown_ms: float) -> Iterator[str]:
    """Yield one mode's title, rows, bars, the tokens that its rounds committed, and its speed over the first one's."""
    saying = escape(f": {_SAYINGS[panel.mode]}") if panel.mode in _SAYINGS else ""
    yield (
        f'<text x="24" y="{top + 20}" font-size="14" font-weight="600" fill="{_INK}">{escape(panel.mode)}'
        f'<tspan font-size="13" font-weight="400" fill="{_GREY}">{saying}</tspan></text>'
    )
    places = {row: top + _HEAD + _ROW * index for index, row in enumerate(sorted(panel.rows))}
    for row, place in places.items():
        lane, _, device = panel.rows[row].partition(" on ")
        yield (
            f'<text x="24" y="{place + 12}" font-size="12.5" fill="{_INK}">{escape(lane)}</text>'
            f'<text x="24" y="{place + 25}" font-size="11" fill="{_GREY}">{escape(device)}</text>'
        )
    for bar in panel.bars:
        if bar.start_ms < shown_ms:
            yield _bar(bar, places[bar.row], shown_ms)
    bottom = top + _HEAD + _ROW * len(places)
    yield f'<text x="24" y="{bottom + 14}" font-size="12.5" fill="{_INK}">tokens</text>'
    for item in panel.rounds:
        if item.start_ms < shown_ms:
            yield from _round(item, top + _HEAD, bottom, shown_ms)
    made, ratio = panel.tokens(shown_ms), panel.speed / first.speed
    beside = (
        f'<tspan font-size="12" font-weight="400" fill="{_GREY}"> ({ratio:.1f}x)</tspan>' if panel is not first else ""
    )
    yield (
        f'<text x="{_RIGHT + 12}" y="{bottom + 15}" font-size="17" font-weight="600" fill="{_TOKEN}">{made}'
        f"{beside}</text>"
    )


def _bar(bar: Bar, top: int, shown_ms: float) -> str:
    left, right = _across(max(bar.start_ms, 0.0), shown_ms), _across(bar.end_ms, shown_ms)
    fill = "url(#wait)" if bar.name in _WAITS else _COLOURS.get(bar.name, "#e6e6e6")
    tip = f"{escape(bar.name)} {bar.end_ms - bar.start_ms:.2f} ms"
    shape = (
        f'<rect x="{left:.1f}" y="{top}" width="{max(right - left, 0.5):.1f}" height="{_BAR}" rx="2" fill="{fill}">'
        f"<title>{tip}</title></rect>"
    )
    if right - left < 7 * len(bar.name):  # about as wide as its letters
        return shape
    middle = (left + right) / 2
    text = f'<text x="{middle:.1f}" y="{top + 17}" text-anchor="middle" font-size="11" fill="{_INK}">'
    return f"{shape}{text}{escape(bar.name)}</text>"


def _round(item: RoundMark, top: int, bottom: int, shown_ms: float) -> Iterator[str]:
    """Yield a line at a round's start, and at its end a dot for each token that it committed."""
    left, right = _across(item.start_ms, shown_ms), _across(item.end_ms, shown_ms)
    yield f'<line x1="{left:.1f}" y1="{top - 4}" x2="{left:.1f}" y2="{bottom + 20}" stroke="{_GREY}" stroke-width="1"/>'
    if item.end_ms > shown_ms:
        return
    step = min(_DOT_STEP, (right - left) / max(item.committed, 1))
    fate = {None: "", True: "; the next window was ready", False: "; no branch fitted, the draft is asked again"}
    yield f"<g><title>{item.committed} tokens{fate[item.reused]}</title>"
    for index in range(item.committed):
        across = right - step * (item.committed - index - 0.5)
        yield f'<circle cx="{across:.1f}" cy="{bottom + 10}" r="{_DOT}" fill="{_TOKEN}"/>'
    yield "</g>"


def _axis(top: int, bottom: int, shown_ms: float) -> Iterator[str]:
    """Yield the time axis below the panels and its grid."""
    step = _tick(shown_ms)
    for index in range(int(shown_ms / step) + 1):
        across = _across(index * step, shown_ms)
        number = f"{index * step:g}"
        yield (
            f'<line x1="{across:.1f}" y1="{top}" x2="{across:.1f}" y2="{bottom}" stroke="{_LINE}" '
            f'stroke-dasharray="2 4"/><text x="{across:.1f}" y="{bottom + 16}" text-anchor="middle" font-size="11" '
            f'fill="{_GREY}">{number}</text>'
        )
    yield f'<text x="{_RIGHT + 12}" y="{bottom + 16}" font-size="11" fill="{_GREY}">ms</text>'


def _legend(top: int, names: set[str]) -> Iterator[str]:
    left = _LEFT
    for name in [known for known in _COLOURS if known in names]:
        yield (
            f'<rect x="{left}" y="{top}" width="14" height="14" rx="2" fill="{_COLOURS[name]}"/>'
            f'<text x="{left + 20}" y="{top + 11}" font-size="11.5" fill="{_GREY}">{name}</text>'
        )
        left += 36 + 7 * len(name)
    if names & set(_WAITS):
        yield (
            f'<rect x="{left}" y="{top}" width="14" height="14" rx="2" fill="url(#wait)" stroke="{_LINE}"/>'
            f'<text x="{left + 20}" y="{top + 11}" font-size="11.5" fill="{_GREY}">waiting</text>'
        )


def _across(time_ms: float, shown_ms: float) -> float:
    return _LEFT + min(time_ms / shown_ms, 1.0) * (_RIGHT - _LEFT)


def _tick(shown_ms: float) -> float:
    """Return a round number of ms that divides the axis into 4 to 10 parts."""
    step = 1e-3
    for factor in (2.0, 2.5, 2.0) * 12:
        if shown_ms / step <= 10:
            break
        step *= factor
    return round(step, 6)


if __name__ == "__main__":
    main()
