"""The figures of an evaluation, out of positions. Pure: numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    shaped_fanout,
    tokens_per_round,
)

TOP = 24  # likeliest tokens kept per position: enough for 16 candidates of two sources and an excluded one
_MOST = 16  # candidates per position that are reported


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured: window, answer and context lengths in tokens."""

    gamma: int = 7
    kappa: int = 8
    max_new_tokens: int = 128
    max_length: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class Measured:
    """One question's positions: greedy, at temperature 1, and at temperature 1 with the draft's noise coupled."""

    number: int
    category: str
    greedy: Positions
    sampled: Positions
    coupled: Positions


_LAWS: dict[str, Callable[[Measured], Positions]] = {
    "greedy": lambda each: each.greedy,
    "temperature_1": lambda each: each.sampled,
    "temperature_1_coupled": lambda each: each.coupled,
}


def save_positions(path: Path, measured: Sequence[Measured]) -> None:
    """Write the positions of all questions into one `.npz` file, so that figures can be made again."""
    arrays: dict[str, Any] = {
        "number": np.array([each.number for each in measured]),
        "category": np.array([each.category for each in measured]),
    }
    for law, take in _LAWS.items():
        texts = [take(each) for each in measured]
        parts: dict[str, list[Ints]] = {
            "tokens": [text.tokens for text in texts],
            "draft": [text.draft for text in texts],
        }
        for layer in texts[0].exits:
            parts[f"exit_{layer}"] = [text.exits[layer] for text in texts]
        arrays[f"{law}.lengths"] = np.array([len(text.tokens) for text in texts])
        arrays |= {f"{law}.{name}": _narrow(np.concatenate(part)) for name, part in parts.items()}
    np.savez_compressed(path, **arrays)


def load_positions(path: Path) -> list[Measured]:
    """Return what `save_positions` wrote."""
    with np.load(path) as stored:
        arrays = dict(stored)
    laws = [_texts(arrays, law) for law in _LAWS]
    pairs = zip(arrays["number"].tolist(), arrays["category"].tolist(), strict=True)
    return [Measured(*pair, *texts) for pair, *texts in zip(pairs, *laws, strict=True)]


def report(measured: Sequence[Measured], options: EvaluationOptions) -> dict[str, Any]:
    """Return all figures as JSON values: by law, overall and by category, and the curves over branches."""
    groups = {"overall": list(measured)}
    for each in sorted(measured, key=lambda item: item.category):
        groups.setdefault(each.category, []).append(each)
    return {
        law: {name: _figures([take(each) for each in group], options) for name, group in groups.items()}
        | {"branches": _branch_curve([(each.number, take(each)) for each in measured], options)}
        for law, take in _LAWS.items()
    }


def _texts(arrays: Mapping[str, Any], law: str) -> list[Positions]:
    cuts = np.cumsum(arrays[f"{law}.lengths"])[:-1]
    names = [name for name in arrays if name.startswith(f"{law}.") and not name.endswith(".lengths")]
    parts = {name.partition(".")[2]: np.split(arrays[name].astype(np.int64), cuts) for name in names}
    layers = {int(name.removeprefix("exit_")): part for name, part in parts.items() if name.startswith("exit_")}
    return [
        Positions(tokens, draft, {layer: layers[layer][i] for layer in layers})
        for i, (tokens, draft) in enumerate(zip(parts["tokens"], parts["draft"], strict=True))
    ]


def _narrow(values: Ints) -> Any:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def _figures(texts: Sequence[Positions], options: EvaluationOptions) -> dict[str, Any]:
    tokens = [text.tokens[1:] for text in texts]
    exits = {str(layer): coverage([text.exits[layer][1:] for text in texts], tokens, _MOST) for layer in texts[0].exits}
    draft = coverage([text.draft[1:] for text in texts], tokens, _MOST)
    return {
        "texts": len(texts),
        "positions": sum(len(part) for part in tokens),
        "tokens_per_round": tokens_per_round([text.agreed for text in texts], options.gamma),
        "draft_coverage": draft,
        "exit_coverage": exits,
        "prepared": dict(_prepared(texts, options)),
    }


def _prepared(texts: Sequence[Positions], options: EvaluationOptions) -> Iterator[tuple[str, float]]:
    uniform = [options.kappa] * (options.gamma + 1)
    doubled = [2 * options.kappa] * (options.gamma + 1)
    yield "draft", prepared(_outcomes(texts, None, ("draft",), options), uniform)
    for layer in texts[0].exits:
        yield f"exit_{layer}", prepared(_outcomes(texts, layer, ("exit",), options), uniform)
        both = _outcomes(texts, layer, ("exit", "draft"), options)
        yield f"both_{layer}", prepared(both, uniform)
        yield f"both_{layer}_doubled", prepared(both, doubled)


def _outcomes(
    texts: Sequence[Positions], layer: int | None, sources: Sequence[str], options: EvaluationOptions
) -> list[Outcome]:
    found: list[Outcome] = []
    for text in texts:
        tops = [text.draft if source == "draft" or layer is None else text.exits[layer] for source in sources]
        found += outcomes(text, tops, options.gamma)
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
        yield layer, ("exit", "draft")
