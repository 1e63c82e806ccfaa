"""The figures of an evaluation, out of positions. Pure: numpy alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mirror.distill.rounds import (
    Ints,
    Outcome,
    Positions,
    coverage,
    outcomes,
    prepared,
    schedules,
    shaped_fanout,
    tokens_per_round,
)

TOP = 24  # likeliest tokens kept per position: enough for 16 candidates of two sources and an excluded one
GREEDY, SAMPLED, COUPLED = "greedy", "temperature_1", "temperature_1_coupled"
_MOST = 16  # candidates per position that are reported
_FEW_PASSES = 3  # passes of a rollout that a default may take


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured: window, answer and context lengths in tokens.

    `vocabularies`: sizes of a trimmed draft vocabulary to measure with. `coupled_scores`: how many of a pupil's
    likeliest tokens get the target's noise, beside all of them. `branches`: how many a suggested fan-out has.
    """

    gamma: int = 7
    kappa: int = 8
    max_new_tokens: int = 128
    max_length: int = 2048
    vocabularies: tuple[int, ...] = (8192, 16384, 24576, 32768)
    coupled_scores: tuple[int, ...] = (9, 16, 32, 64)
    branches: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """One question's positions by law.

    `greedy`, and that with trimmed vocabularies; at temperature 1, and that with draft and heads knowing the noise.
    """

    number: int
    category: str
    laws: Mapping[str, Positions]


def save_positions(path: Path, measured: Sequence[Measured]) -> None:
    """Write the positions of all questions into one `.npz` file, so that figures can be made again."""
    arrays: dict[str, Any] = {
        "number": np.array([each.number for each in measured]),
        "category": np.array([each.category for each in measured]),
    }
    for law in measured[0].laws:
        texts = [each.laws[law] for each in measured]
        parts: dict[str, list[Ints]] = {
            "tokens": [text.tokens for text in texts],
            "draft": [text.draft for text in texts],
        }
        for layer in texts[0].exits:
            parts[f"exit_{layer}"] = [text.exits[layer] for text in texts]
        for name in ("ahead", "branch"):
            if getattr(texts[0], name).size:
                parts[name] = [getattr(text, name) for text in texts]
        arrays[f"{law}.lengths"] = np.array([len(text.tokens) for text in texts])
        arrays |= {f"{law}.{name}": _narrow(np.concatenate(part)) for name, part in parts.items()}
    np.savez_compressed(path, **arrays)


def load_positions(path: Path) -> list[Measured]:
    """Return what `save_positions` wrote."""
    with np.load(path) as stored:
        arrays = dict(stored)
    laws = {name.removesuffix(".lengths"): None for name in arrays if name.endswith(".lengths")}
    texts = {law: _texts(arrays, law) for law in laws}
    pairs = zip(arrays["number"].tolist(), arrays["category"].tolist(), strict=True)
    return [Measured(*pair, {law: texts[law][i] for law in laws}) for i, pair in enumerate(pairs)]


def report(measured: Sequence[Measured], options: EvaluationOptions) -> dict[str, Any]:
    """Return all figures as JSON values: by law, overall and by category, and the curves over branches and passes."""
    groups = {"overall": list(measured)}
    for each in sorted(measured, key=lambda item: item.category):
        groups.setdefault(each.category, []).append(each)
    found: dict[str, Any] = {}
    for law in measured[0].laws:
        shown = groups if law in (GREEDY, SAMPLED, COUPLED) else {"overall": groups["overall"]}
        found[law] = {name: _figures([each.laws[law] for each in group], options) for name, group in shown.items()}
        if len(shown) > 1:
            found[law]["branches"] = _branch_curve([(each.number, each.laws[law]) for each in measured], options)
    found[GREEDY]["passes"] = pass_curve([each.laws[GREEDY] for each in measured], options)
    return found


def pass_curve(texts: Sequence[Positions], options: EvaluationOptions) -> list[dict[str, Any]]:
    """Return, for each number of passes of a rollout, the best schedule's tokens per round; then every one of 3."""
    most = 1 + (texts[0].ahead.shape[1] if texts[0].ahead.size else 0)
    rows: list[dict[str, Any]] = []
    for passes in range(1, options.gamma + 1):
        tried = [(_per_round(texts, options, each), list(each)) for each in schedules(options.gamma, passes, most)]
        tried.sort(reverse=True)
        for value, each in tried[: None if passes == _FEW_PASSES else 1]:
            rows.append({"passes": passes, "tokens_per_pass": each, "tokens_per_round": value})
    return rows


def suggested(measured: Sequence[Measured], options: EvaluationOptions) -> dict[str, Any]:
    """Return the defaults that follow: exit layer and source, fan-out and tokens of each pass.

    Of the exit layers the one that prepares most outcomes with the draft's candidates beside its own; of the schedules
    of at most three passes the best. Candidates are the draft's alone (`candidates.source_of` says why).
    """
    texts = [each.laws[GREEDY] for each in measured]
    few = [row for row in pass_curve(texts, options) if row["passes"] <= _FEW_PASSES]
    schedule: list[int] = max(few, key=lambda row: row["tokens_per_round"])["tokens_per_pass"] if few else [1]
    shaped: dict[int | None, tuple[float, list[int]]] = {}
    for layer, sources in _source_choices(texts[0]):
        if "draft" in sources:
            known = _outcomes(texts, layer, sources, options, schedule)
            fanout = shaped_fanout(known, options.gamma, options.branches, TOP - 1)
            shaped[layer] = prepared(known, fanout), fanout
    layer = max(shaped, key=lambda layer: shaped[layer][0])
    fanout = shaped[None][1]
    found = {"candidates": "draft", "fanout": fanout, "tokens_per_pass": schedule, "kappa": max(fanout)}
    return found if layer is None else {"exit_layer": layer, **found}


def _texts(arrays: Mapping[str, Any], law: str) -> list[Positions]:
    cuts = np.cumsum(arrays[f"{law}.lengths"])[:-1]
    names = [name for name in arrays if name.startswith(f"{law}.") and not name.endswith(".lengths")]
    parts = {name.removeprefix(f"{law}."): np.split(arrays[name].astype(np.int64), cuts) for name in names}
    layers = {int(name.removeprefix("exit_")): part for name, part in parts.items() if name.startswith("exit_")}
    more = [name for name in ("ahead", "branch") if name in parts]
    return [
        Positions(
            tokens, draft, {layer: layers[layer][i] for layer in layers}, **{name: parts[name][i] for name in more}
        )
        for i, (tokens, draft) in enumerate(zip(parts["tokens"], parts["draft"], strict=True))
    ]


def _narrow(values: Ints) -> Any:
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    return values.astype(np.promote_types(np.min_scalar_type(low), np.min_scalar_type(high)))


def _figures(texts: Sequence[Positions], options: EvaluationOptions) -> dict[str, Any]:
    tokens = [text.tokens[1:] for text in texts]
    exits = {str(layer): coverage([text.exits[layer][1:] for text in texts], tokens, _MOST) for layer in texts[0].exits}
    draft = coverage([text.draft[1:] for text in texts], tokens, _MOST)
    return {
        "texts": len(texts),
        "positions": sum(len(part) for part in tokens),
        "tokens_per_round": _per_round(texts, options, (1,)),
        "draft_coverage": draft,
        "exit_coverage": exits,
        "prepared": dict(_prepared(texts, options)),
    }


def _per_round(texts: Sequence[Positions], options: EvaluationOptions, tokens_per_pass: Sequence[int]) -> float:
    return tokens_per_round(text.agreed(options.gamma, tokens_per_pass) for text in texts)


def _prepared(texts: Sequence[Positions], options: EvaluationOptions) -> Iterator[tuple[str, float]]:
    uniform = [options.kappa] * (options.gamma + 1)
    doubled = [2 * options.kappa] * (options.gamma + 1)
    yield "draft", prepared(_outcomes(texts, None, ("draft",), options), uniform)
    for layer in texts[0].exits:
        yield f"exit_{layer}", prepared(_outcomes(texts, layer, ("exit",), options), uniform)
        both = _outcomes(texts, layer, ("draft", "exit"), options)
        yield f"both_{layer}", prepared(both, uniform)
        yield f"both_{layer}_doubled", prepared(both, doubled)


def _outcomes(
    texts: Sequence[Positions],
    layer: int | None,
    sources: Sequence[str],
    options: EvaluationOptions,
    tokens_per_pass: Sequence[int] = (1,),
) -> list[Outcome]:
    found: list[Outcome] = []
    for text in texts:
        tops = [text.draft if source == "draft" or layer is None else text.exits[layer] for source in sources]
        found += outcomes(text, tops, options.gamma, tokens_per_pass)
    return found


def _branch_curve(texts: Sequence[tuple[int, Positions]], options: EvaluationOptions) -> list[dict[str, Any]]:
    """Return prepared outcomes against the number of branches, uniform and shaped.

    The shape is fitted on questions of even number and measured, as the uniform ones here, on the odd.
    """
    fit, test = ([text for number, text in texts if number % 2 == odd] for odd in (0, 1))
    rows = []
    for layer, sources in _source_choices(texts[0][1]):
        known = _outcomes(fit, layer, sources, options)
        unseen = _outcomes(test, layer, sources, options)
        for kappa in (1, 2, 4, 8, 16):
            branches = kappa * (options.gamma + 1)
            fanout = shaped_fanout(known, options.gamma, branches, TOP - 1)
            rows.append(
                {
                    "source": "+".join(sources),
                    "exit_layer": layer,
                    "branches": branches,
                    "uniform": prepared(unseen, [kappa] * (options.gamma + 1)),
                    "shaped": prepared(unseen, fanout),
                    "fanout": fanout,
                }
            )
    return rows


def _source_choices(text: Positions) -> Iterator[tuple[int | None, tuple[str, ...]]]:
    yield None, ("draft",)
    for layer in text.exits:
        yield layer, ("exit",)
        yield layer, ("draft", "exit")
