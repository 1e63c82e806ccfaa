"""The timeline of several modes: one axis, what overlapped, what was committed."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

from click.testing import CliRunner

import mirror
from mirror.bench.timeline import Panel, draw, main, read_panel
from mirror.runtime.records import Lane, Mode, Round, Span
from mirror.runtime.trace import chrome_trace
from tests.lookup import Lookup, LookupBundle, agreeing_table, random_table, write_bundle

SVG = "{http://www.w3.org/2000/svg}"


def one_round(start_s: float, mode: Mode, spans: list[tuple[str, Lane, float, float]], committed: int) -> Round:
    made = tuple(Span(name, lane, start_s + begin, start_s + end) for name, lane, begin, end in spans)
    end_s = max(span.end_s for span in made if span.lane is Lane.TARGET)
    return Round(mode, 3, committed - 1, committed, mode is Mode.MIRROR or None, 4, start_s, end_s, made)


def panel(mode: Mode, spans: list[tuple[str, Lane, float, float]], step_s: float, committed: int) -> Panel:
    rounds = [one_round(5.0 + step_s * index, mode, spans, committed) for index in range(8)]
    trace = chrome_trace((), rounds, {Lane.TARGET: "cuda:0", Lane.DRAFT: "openvino:CPU"})
    return read_panel(json.loads(json.dumps(trace)), 2)


PLAIN = panel(Mode.PLAIN, [("prefix", Lane.TARGET, 0.0, 0.004), ("suffix", Lane.TARGET, 0.004, 0.01)], 0.01, 1)
MIRROR = panel(
    Mode.MIRROR,
    [
        ("prefix", Lane.TARGET, 0.0, 0.004),
        ("trunk", Lane.DRAFT, 0.0, 0.004),
        ("suffix", Lane.TARGET, 0.004, 0.01),
        ("rollout", Lane.DRAFT, 0.005, 0.012),
        ("rollout_wait", Lane.TARGET, 0.01, 0.012),
    ],
    0.012,
    3,
)


def bars(svg: str) -> dict[str, list[tuple[float, float, float]]]:
    """Return (left, right, top) of every bar that tells its name."""
    found: dict[str, list[tuple[float, float, float]]] = {}
    for item in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        title = item.find(f"{SVG}title")
        if title is not None and title.text is not None:
            left, width = float(item.attrib["x"]), float(item.attrib["width"])
            found.setdefault(title.text.split()[0], []).append((left, left + width, float(item.attrib["y"])))
    return found


def test_a_panel_begins_with_the_round_that_is_asked_for() -> None:
    assert PLAIN.mode == "plain"
    assert len(PLAIN.rounds) == 6
    assert PLAIN.rounds[0].start_ms == 0.0
    assert abs(PLAIN.rounds[1].start_ms - 10.0) < 1e-6
    assert list(PLAIN.rows.values()) == ["target on cuda:0"]  # no draft took part
    assert list(MIRROR.rows.values()) == ["target on cuda:0", "draft on openvino:CPU"]


def test_tokens_are_counted_in_the_time_shown() -> None:
    assert PLAIN.tokens(36.5) == 3
    assert MIRROR.tokens(36.5) == 9
    text = "".join(ElementTree.fromstring(draw([PLAIN, MIRROR], 3, "both")).itertext())
    assert "3 tokens; the next window was ready" in text
    assert "9 (2.5x)" in text  # nine tokens shown; 3 in 12 ms against 1 in 10
    dots = list(ElementTree.fromstring(draw([PLAIN, MIRROR], 3, "both")).iter(f"{SVG}circle"))
    assert len(dots) == 3 + 9


def test_all_modes_share_one_axis_and_draft_work_lies_beside_the_suffix() -> None:
    drawn = bars(draw([PLAIN, MIRROR], 3, "both"))
    # 36 ms fill the axis: three rounds of the slower mode, three and a part of the other's.
    assert len(drawn["suffix"]) == 4 + 3
    (plain_suffix, *_), mirror_suffix = drawn["suffix"], drawn["suffix"][4]
    assert plain_suffix[:2] == mirror_suffix[:2]
    rollout = drawn["rollout"][0]
    assert rollout[0] < mirror_suffix[1] < rollout[1]
    assert rollout[2] > mirror_suffix[2] > plain_suffix[2]
    assert abs(drawn["rollout_wait"][0][0] - mirror_suffix[1]) < 0.2  # drawn to a tenth of a pixel


def test_traces_of_real_runs_are_drawn(tmp_path: Path) -> None:
    target = Lookup(random_table(1, 97, 23))
    bundle = write_bundle(
        tmp_path / "bundle", LookupBundle(target, Lookup(agreeing_table(target.table, 0.8, 2)), random_table(3, 97, 23))
    )
    paths = []
    for mode in ("plain", "mirror"):
        with mirror.load(bundle, mode=mode, threads=1) as engine:
            path = tmp_path / f"{mode}.json"
            path.write_text(json.dumps(engine.generate_tokens([1, 2, 3], max_new_tokens=40).trace()))
            paths.append(str(path))
    run = CliRunner().invoke(main, [*paths, "-o", str(tmp_path / "out.svg"), "--skip", "1"])
    assert run.exit_code == 0, run.output
    assert "rollout" in bars((tmp_path / "out.svg").read_text())
    short = CliRunner().invoke(main, [*paths, "-o", str(tmp_path / "out.svg"), "--rounds", "90"])
    assert short.exit_code == 1
    assert "90 are wanted; make a longer answer, or pass a smaller --skip" in short.output
