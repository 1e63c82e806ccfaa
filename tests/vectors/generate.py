"""The contract between hosts in all languages, as data: `python -m tests.vectors.generate`.

Writes `*.json` beside this file. Expected values come from the Python package's pure parts and, for
generations' tokens, from the tables themselves (`tests.lookup.oracle_*`): no engine, cache or window is
asked. Only what a round proposed and reused, and what a draft says, is what this package's engine says.
`python -m tests.vectors.generate --bundles FOLDER` writes the bundles that `generations.json` names.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import mirror
from mirror.bundle import (
    MANIFEST_NAME,
    ChatFormat,
    FileFacts,
    Form,
    Settings,
    check_files,
    read_manifest,
    write_manifest,
)
from mirror.errors import BundleError, DeviceError, RequestError
from mirror.export.chat_format import derive, render
from mirror.runtime.acceptance import verify
from mirror.runtime.candidates import CandidateSource, by_likelihood, choose_branches, likeliest
from mirror.runtime.draft import Draft, Meeting
from mirror.runtime.feeds import chunk_width
from mirror.runtime.loading import load_draft, make_plan
from mirror.runtime.lookahead import branch_passes, rollout_capacity
from mirror.runtime.memory import SegmentMemory, check_room, segment_memory
from mirror.runtime.noise import gumbel, philox, uniforms
from mirror.runtime.options import EngineOptions
from mirror.runtime.pace import BranchPace
from mirror.runtime.records import Branches, Candidates, FinishReason, Outcome, Rollout
from mirror.runtime.sampling import CoupledNoise, Sampler, SamplingParams
from mirror.runtime.stopping import Stopping
from mirror.targets.base import FreeMemory
from mirror.targets.cpu import CpuDevice
from tests.lookup import Lookup, LookupBundle, agreeing_table, oracle_logits, random_table, write_bundle

FOLDER = Path(__file__).parent
PROMPT = (1, 2, 3, 4, 5, 6, 7)

# The bundles of `generations.json`, by name.

_TARGET = Lookup(random_table(1, 97, 23))
_WIDE = Lookup(random_table(4, 53, 200, spread=1.0))
_CHAIN = Lookup(random_table(51, 11, 11), context=0)

BUNDLES = {
    "context": LookupBundle(_TARGET, Lookup(agreeing_table(_TARGET.table, 0.8, 2)), random_table(3, 97, 23)),
    "wide": LookupBundle(
        _WIDE, Lookup(agreeing_table(_WIDE.table, 0.7, 5)), random_table(6, 53, 200), gamma=4, kappa=5
    ),
    "perfect": LookupBundle(_TARGET, _TARGET, random_table(3, 97, 23), gamma=4, kappa=3, eos=(21,)),
    "streams": LookupBundle(
        _TARGET, Lookup(agreeing_table(_TARGET.table, 0.8, 2)), random_table(3, 97, 23), gamma=5, kappa=3, streams=2
    ),
    "fed": LookupBundle(
        _TARGET, Lookup(agreeing_table(_TARGET.table, 0.8, 2)), random_table(3, 97, 23), gamma=3, feature_layer=1
    ),
    "ngram": LookupBundle(_CHAIN, None, random_table(9, 11, 11), draft_kind="ngram"),
    "alone": LookupBundle(_TARGET),
    "tuned": LookupBundle(
        _TARGET, Lookup(agreeing_table(_TARGET.table, 0.7, 7)), random_table(8, 97, 23), gamma=4, kappa=3, streams=2
    ),
}
SETTINGS = {
    "tuned": Settings(
        fanout=(3, 2, 2, 1, 3), tokens_per_pass=(1,), branches_per_pass=(6,), proposal_tokens_per_pass=(3, 2)
    )
}


@dataclass(frozen=True)
class Generation:
    """One generation of a bundle; hosts run it in every mode that the bundle serves."""

    bundle: str
    prompt: tuple[int, ...] = PROMPT
    max_new_tokens: int = 40
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tokens_per_pass: tuple[int, ...] | None = None
    # Of one number: with falling ones, what a mirror round reuses is as long as the draft had time for.
    branches_per_pass: tuple[int] | None = None
    proposal_tokens_per_pass: tuple[int, ...] | None = None
    draft_context: int | None = None

    @property
    def passes(self) -> dict[str, int | tuple[int, ...] | None]:
        """The options of a draft's passes."""
        return {
            "tokens_per_pass": self.tokens_per_pass,
            "branches_per_pass": self.branches_per_pass,
            "proposal_tokens_per_pass": self.proposal_tokens_per_pass,
            "draft_context": self.draft_context,
        }


_SAMPLED = SamplingParams(1.2, top_k=12, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=77)

GENERATIONS = (
    Generation("context"),
    Generation("context", (5,), 20),
    Generation("context", tuple(range(20)), 100),
    Generation("context", sampling=_SAMPLED),
    Generation("context", sampling=SamplingParams(0.7, seed=2**64 - 1)),
    Generation("wide", max_new_tokens=30),
    Generation("wide", max_new_tokens=30, sampling=SamplingParams(1.0, seed=5)),
    Generation("wide", max_new_tokens=30, sampling=SamplingParams(1.5, top_p=0.9, seed=5)),
    Generation("perfect"),
    Generation("perfect", (2, 9), sampling=SamplingParams(1.0, seed=3)),
    Generation("streams", tokens_per_pass=(3,)),
    Generation("streams", tokens_per_pass=(2, 1), sampling=SamplingParams(0.8, seed=9)),
    Generation("streams", branches_per_pass=(7,), proposal_tokens_per_pass=(3, 2)),
    Generation("wide", max_new_tokens=30, branches_per_pass=(9,), sampling=SamplingParams(1.0, seed=5)),
    Generation("tuned"),
    Generation("tuned", sampling=SamplingParams(0.8, seed=9)),
    Generation("tuned", tokens_per_pass=(2, 1)),
    Generation("tuned", branches_per_pass=(3,)),
    Generation("context", draft_context=9),
    Generation("context", tuple(range(20)), draft_context=6, sampling=SamplingParams(1.0, seed=4)),
    Generation("fed"),
    Generation("fed", sampling=SamplingParams(0.8, seed=9)),
    Generation("ngram", max_new_tokens=50),
    Generation("alone", max_new_tokens=20),
)


def write_bundles(folder: Path) -> None:
    """Write every bundle of `generations.json` into a folder."""
    for name, spec in BUNDLES.items():
        write_bundle(folder / name, spec)
    for name, settings in SETTINGS.items():
        write_manifest(folder / name, dataclasses.replace(read_manifest(folder / name), settings=settings))
    for name, form in chat_formats().items():
        bundle = write_bundle(folder / f"chat-{name}", BUNDLES["alone"])
        write_manifest(bundle, dataclasses.replace(read_manifest(bundle), chat=form))


# What the files hold.


def noise() -> dict[str, Any]:
    """Return Philox blocks, uniforms and Gumbels."""
    counters = [
        ([0, 0, 0, 0], (0, 0)),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF)),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], (0xA4093822, 0x299F31D0)),
    ]
    draws = [(0, 0, 0), (7, 3, 5), (2**64 - 1, 2**40, 49151), (2**32, 1, 0xFFFFFFFF), (12345678901234567890, 17, 2)]
    return {
        "philox": [
            {
                "counter": counter,
                "key": list(key),
                "words": philox(np.array(counter, np.uint64)[:, None], key)[:, 0].tolist(),
            }
            for counter, key in counters
        ],
        "uniforms": [
            # Seeds past 2**53 are strings: not every JSON reader keeps them as numbers.
            {
                "seed": str(seed),
                "position": position,
                "token": token,
                "uniform": value,
                "gumbel": round(float(gumbel(np.array(value))), 10),
            }
            for seed, position, token in draws
            for value in [float(uniforms(seed, position, np.array([token], np.int64))[0])]
        ],
    }


def formula_logits(seed: int, vocab: int, spread: float) -> np.ndarray:
    """Return float32 [vocab], spread * (2 u - 1) of the uniforms of (seed, position 0, token)."""
    return (spread * (2.0 * uniforms(seed, 0, np.arange(vocab)) - 1.0)).astype(np.float32)


def sampling() -> list[dict[str, Any]]:
    """Return rows of logits and the token that each gives."""
    rows: list[tuple[dict[str, Any], np.ndarray]] = [
        ({"values": [1.0, 4.0, 4.0, -2.0]}, np.array([1, 4, 4, -2], np.float32)),
        ({"values": [0.0] * 100}, np.zeros(100, np.float32)),
        # Sums are exact here: 4 of 5 reach 0.8, and no fifth is wanted.
        ({"values": [0.0] * 5}, np.zeros(5, np.float32)),
        ({"values": [0.5, None, 0.25, None]}, np.array([0.5, -np.inf, 0.25, -np.inf], np.float32)),
    ]
    rows += [
        ({"seed": seed, "vocab": vocab, "spread": spread}, formula_logits(seed, vocab, spread))
        for seed, vocab, spread in [(1, 7, 2.0), (2, 256, 3.0), (3, 257, 3.0), (4, 1000, 6.0), (5, 5000, 1.0)]
    ]
    params = [
        SamplingParams(),
        SamplingParams(repetition_penalty=1.7),
        SamplingParams(1.0, seed=11),
        SamplingParams(0.3, seed=2**63 + 5),
        SamplingParams(1.0, top_k=5, seed=1),
        SamplingParams(1.5, top_p=0.8, seed=2),
        SamplingParams(1.0, top_p=0.999, seed=3),
        SamplingParams(1.0, min_p=0.1, seed=4),
        SamplingParams(0.8, top_k=100, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=5),
        SamplingParams(2.0, top_k=70, repetition_penalty=0.8, seed=6),
    ]
    cases = []
    for source, logits in rows:
        for item in params:
            context = [0, 1, 1, 3]
            sampler = Sampler(item, logits.size, np.array(context))
            positions = [0, 1, 17, 2**33, *range(20, 40 if logits.size < 10 else 20)]
            tokens = [sampler.choose(logits, position) for position in positions]
            cases.append(
                {
                    "logits": source,
                    "context": context,
                    "sampling": _sampling(item),
                    "positions": positions,
                    "tokens": tokens,
                }
            )
    return cases


def _sampling(params: SamplingParams) -> dict[str, Any]:
    return {**asdict(params), "seed": str(params.seed)}


def rounds() -> dict[str, Any]:
    """Return the pure steps of a round: branches, verification, order by noise, passes, room, widths, endings."""
    return {
        "branches": [_branches_case(*case) for case in _BRANCHES],
        "likelihoods": [_likelihood_case(*case) for case in _LIKELIHOODS],
        "verify": [_verify_case(*case) for case in _VERIFY],
        "noise_order": _noise_case(),
        "passes": [_passes_case(*case) for case in [((1,), 7), ((3,), 7), ((2, 1), 5), ((4, 2, 1), 9), ((3,), 2)]],
        "capacities": [_capacity_case(*case) for case in _CAPACITIES],
        "chunks": [
            {"widths": list(widths), "rows": rows, "room": room, "taken": list(chunk_width(widths or None, rows, room))}
            for widths in ((), (1, 8, 128), (1, 4), (16,))
            for rows, room in [(1, 200), (5, 200), (8, 200), (9, 200), (70, 200), (200, 500), (100, 100), (20, 30)]
        ],
        "paces": [_pace_case(branches) for branches in (64, 20, 5)],
        "endings": [
            _ending_case(*case)
            for case in [((), 5, (1, 2, 3)), ((3,), 5, (1, 3, 3, 4)), ((4,), 2, (1, 2, 4)), ((2,), 2, (1, 2))]
        ],
    }


_BRANCHES = [
    ((5, 6, 7), [[[6, 1, 2], [7, 7, 3], [4, 5, 6]]], (2, 2, 2)),
    ((5, 6, 7), [[[6, 1, 2], [8, 1, 3], [4, 5, 6]], [[1, 9, 2], [3, 2, 7], [-1, -1, -1]]], (2, 3, 3)),
    ((5,), [[[1, 2, 3, 4]], [[2, 1, 8, 8]]], (4,)),
    ((5, 6), [[[-1, -1], [0, -1]]], (3, 0)),
    ((1, 2, 3, 4), [[[9, 8], [9, 8], [9, 8], [9, 8]]], (2, 1, 0, 2)),
]
# Fan-outs, branches that leave after each position, and how many of all are kept. In some, parts of different fan-outs
# are equal, and in the last one these are no binary fractions.
_LIKELIHOODS = [
    ((2, 2, 2), (2, 2, 2), 3),
    ((6, 3, 2, 1), (6, 3, 2, 1), 5),
    ((1, 2, 3, 8), (1, 2, 3, 8), 1),
    ((4, 0, 2), (1, 0, 2), 2),
    ((3, 3), (3, 1), 4),
    ((5, 4), (0, 0), 2),
    ((49, 7, 14), (49, 7, 14), 33),
]
# A context's length, gamma, branches, tokens per pass, branches per pass, and the most that a proposal's pass gives.
_CAPACITIES: list[tuple[int, int, int, tuple[int, ...], tuple[int, ...], int]] = [
    (20, 4, 10, (1,), (), 1),
    (20, 4, 10, (1,), (10, 5, 2), 1),
    (20, 4, 10, (1,), (), 4),
    (20, 7, 12, (3, 2), (12, 7), 2),
    (20, 3, 2, (1,), (8, 4, 1), 1),
    (0, 5, 6, (2, 1), (4,), 3),
    (0, 1, 0, (1,), (3,), 1),
]
_VERIFY = [((5, 6, 7), (6, 7, 9)), ((5, 6, 7), (6, 8, 9)), ((5, 6, 7), (0, 7, 9)), ((5,), (4,))]


def _branches_case(window: Sequence[int], sources: Sequence[Any], fanout: Sequence[int]) -> dict[str, Any]:
    found = choose_branches(
        np.array(window), [Candidates(np.array(ids), None) for ids in sources], np.array(fanout, np.int64)
    )
    return {"window": window, "sources": sources, "fanout": fanout, "branches": _pairs(found)}


def _likelihood_case(fanout: Sequence[int], counts: Sequence[int], count: int) -> dict[str, Any]:
    accepted = np.repeat(np.arange(len(counts)), counts)
    branches, odds = Branches(accepted, np.arange(100, 100 + accepted.size)), np.array(fanout, np.int64)
    kept = likeliest(branches, odds, count)
    return {
        "fanout": fanout,
        "branches": _pairs(branches),
        "order": by_likelihood(branches, odds).tolist(),
        "count": count,
        "kept": _pairs(kept),
    }


def _pairs(branches: Branches) -> list[tuple[int, int]]:
    return list(zip(branches.accepted.tolist(), branches.next_tokens.tolist(), strict=True))


def _capacity_case(
    max_length: int,
    gamma: int,
    branches: int,
    tokens_per_pass: tuple[int, ...],
    branches_per_pass: tuple[int, ...],
    most_given: int,
) -> dict[str, Any]:
    slots = rollout_capacity(max_length, gamma, branches, tokens_per_pass, branches_per_pass, most_given)
    return {
        "max_length": max_length,
        "gamma": gamma,
        "branches": branches,
        "tokens_per_pass": tokens_per_pass,
        "branches_per_pass": branches_per_pass,
        "most_given": most_given,
        "slots": slots,
    }


def _verify_case(window: Sequence[int], choices: Sequence[int]) -> dict[str, Any]:
    outcome = verify(window, lambda row: choices[row])
    return {"window": window, "choices": choices, "accepted": outcome.accepted, "next": outcome.next_token}


def _noise_case() -> dict[str, Any]:
    ids = np.array([[3, 1, 4, -1], [9, 2, 6, 5], [1, 1, 0, 7]], np.int64)
    logprobs = np.array([[-0.5, -1.25, -2, -3], [-1, -1, -1, -1], [-0.125, -3, -4, -4.5]], np.float32)
    positions = np.array([4, 5, 6])
    ordered = CoupledNoise(12, 0.7).ordered(Candidates(ids, logprobs), positions)
    return {
        "seed": "12",
        "temperature": 0.7,
        "positions": positions.tolist(),
        "ids": ids.tolist(),
        "logprobs": logprobs.tolist(),
        "ordered": ordered.ids.tolist(),
    }


def _passes_case(tokens_per_pass: tuple[int, ...], depth: int) -> dict[str, Any]:
    passes = [[item.real, item.gives] for item in branch_passes(tokens_per_pass, depth)]
    return {"tokens_per_pass": tokens_per_pass, "depth": depth, "passes": passes}


def _pace_case(branches: int) -> dict[str, Any]:
    """How many branches take part in four passes after each of some rollouts: late ones, early ones, and neither."""
    pace, ends = BranchPace(branches), [*[(1.0, 8.0)] * 14, (0.5, 30.0), *[(-2.0, 8.0)] * 9, (-0.5, 8.0)]
    taken = []
    for late_s, spent_s in ends:
        pace.note(late_s, spent_s)
        first = pace.first(branches)
        taken.append([first, *(pace.later(number, first) for number in range(4))])
    return {"branches": branches, "ends": ends, "taken": taken}


def _ending_case(eos: Sequence[int], limit: int, tokens: tuple[int, ...]) -> dict[str, Any]:
    kept, reason = Stopping(eos, limit, None).cut(tokens)
    return {"eos": eos, "limit": limit, "tokens": tokens, "kept": kept, "reason": reason.value if reason else None}


# Manifests: a good one as text, and edits of that text. `[from, to]` stands for one place in it.

_NOTE, _NOTE_TEXT = "note.txt", "hello"
_CHAT = ChatFormat({"start": {"user": "Q: "}, "user": {"answer": "\nA:"}}, ("user",), ("</think>",), empty=True)
# On one line, so that edits of it are.
_CHAT_TEXT = json.dumps(dataclasses.asdict(_CHAT))

_EDITS: list[tuple[str, tuple[str, str]]] = [
    ("good", ("", "")),
    ("another gamma", ('"gamma": 1', '"gamma": 7')),
    ("settings that say something", ('"mode": null', '"mode": "serial"')),
    ("a fanout", ('"fanout": null', '"fanout": [2, 0]')),
    ("an absent setting", ('"tokens_per_pass": null,', "")),
    ("an absent limit", ('"branches_per_pass": null,', "")),
    ("absent passes of a proposal", ('"proposal_tokens_per_pass": null,', "")),
    ("branches per pass", ('"branches_per_pass": null', '"branches_per_pass": [8, 4, 1]')),
    ("branches that follow the box", ('"adapt_branches": null', '"adapt_branches": true')),
    ("a number for a yes", ('"adapt_branches": null', '"adapt_branches": 1')),
    ("an absent draft's context", ('"draft_context": null,', "")),
    ("a draft's context", ('"draft_context": null', '"draft_context": 2')),
    ("passes of a proposal", ('"proposal_tokens_per_pass": null', '"proposal_tokens_per_pass": [4, 2]')),
    ("a program", ('"graphs": {', '"program": "draft_int8.json", "graphs": {')),
    ("no json", ('"schema_version"', "schema_version")),
    ("cut short", ('"files"', '"files')),
    ("an older version", ('"schema_version": 2', '"schema_version": 1')),
    ("a version in text", ('"schema_version": 2', '"schema_version": "2"')),
    ("an unknown key at the top", ('"producer"', '"colour": 1, "producer"')),
    ("an unknown key inside", ('"gamma"', '"delta": 1, "gamma"')),
    ("a missing key", ('"gamma": 1,', "")),
    ("a number in text", ('"gamma": 1', '"gamma": "1"')),
    ("a fraction", ('"gamma": 1', '"gamma": 1.5')),
    ("a boolean for a number", ('"gamma": 1', '"gamma": true')),
    ("gamma below 1", ('"gamma": 1', '"gamma": 0')),
    ("a negative end token", ('"eos": []', '"eos": [-1]')),
    ("a text for a list", ('"eos": []', '"eos": "x"')),
    ("an unknown precision", ('"precision": "fp32"', '"precision": "fp8"')),
    ("an unknown draft kind", ('"kind": "model"', '"kind": "magic"')),
    ("negative streams", ('"streams": 0', '"streams": -1')),
    ("an unknown mode", ('"mode": null', '"mode": "auto"')),
    ("an empty fanout", ('"fanout": null', '"fanout": []')),
    ("a negative fanout", ('"fanout": null', '"fanout": [1, -1]')),
    ("tokens per pass of 0", ('"tokens_per_pass": null', '"tokens_per_pass": [0]')),
    ("no branches per pass", ('"branches_per_pass": null', '"branches_per_pass": []')),
    ("branches per pass of 0", ('"branches_per_pass": null', '"branches_per_pass": [2, 0]')),
    ("a number for branches per pass", ('"branches_per_pass": null', '"branches_per_pass": 8')),
    ("a proposal's passes of 0", ('"proposal_tokens_per_pass": null', '"proposal_tokens_per_pass": [0]')),
    ("a draft's context of 1", ('"draft_context": null', '"draft_context": 1')),
    ("a device that is a number", ('"target_device": null', '"target_device": 0')),
    ("a hash that is none", ('"tokenizer_fingerprint": "', '"tokenizer_fingerprint": "z')),
    ("an unknown dtype", ('"dtype": "int64"', '"dtype": "int8"')),
    ("an unknown dimension", ('"width"', '"breadth"')),
    ("a segment of another name", ('"exit_head": {', '"exit_tail": {')),
    ("a program that is a number", ('"graphs": {', '"program": 1, "graphs": {')),
    ("no program, said so", ('"graphs": {', '"program": null, "graphs": {')),
    ("a negative file size", ('"bytes": ', '"bytes": -')),
    ("no chat format", (_CHAT_TEXT, "null")),
    ("a chat format in text", (_CHAT_TEXT, '"chatml"')),
    ("an unknown key in the chat format", ('"trimmed"', '"stripped": 1, "trimmed"')),
    ("a chat format without limits", (', "refused": ["</think>"]', "")),
    ("an unknown role before", ('"start": {', '"narrator": {')),
    ("an unknown role after", ('"answer": "', '"tool": "')),
    ("a number between messages", ('"answer": "\\nA:"', '"answer": 7')),
    ("an unknown role that is trimmed", ('"trimmed": ["user"]', '"trimmed": ["users"]')),
    ("an empty text that is refused", ('"refused": ["</think>"]', '"refused": [""]')),
    ("a time in a chat format", ('"date": null', '"date": "%H:%M"')),
    ("a number for a truth", ('"empty": true', '"empty": 1')),
    ("a file that is listed and missing", ('"note.txt": {', '"note_2.txt": {')),
    ("a file of another size", ('"bytes": ', '"bytes": 9')),
]


def manifests(folder: Path) -> dict[str, Any]:
    """Return a good manifest as text, and edits with what a host says of them.

    The folder of such a manifest needs one file beside it, which `file` gives.

    Args:
        folder: a bundle whose manifest is taken as the model.
    """
    (folder / _NOTE).write_text(_NOTE_TEXT, encoding="utf-8")
    files = {_NOTE: FileFacts(len(_NOTE_TEXT), hashlib.sha256(_NOTE_TEXT.encode()).hexdigest())}
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=files))
    data = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    chat = '"chat": null'
    text = json.dumps(data, indent=1, ensure_ascii=False).replace(chat, f'"chat": {_CHAT_TEXT}') + "\n"
    cases = []
    for name, (old, new) in _EDITS:
        edited = text.replace(old, new, 1) if old else text
        assert edited != text or not old, f"the edit {name!r} changes nothing"
        cases.append({"name": name, "from": old, "to": new, "error": _refusal(folder, edited)})
    return {"manifest": text, "file": {"name": _NOTE, "content": _NOTE_TEXT}, "cases": cases}


def _refusal(folder: Path, text: str) -> str | None:
    """Return what is said of a manifest, from where it no longer names a path; None if it is good."""
    path = folder / MANIFEST_NAME
    before = path.read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    try:
        check_files(folder, read_manifest(folder))
    except BundleError as error:
        # What follows a parser's own words, or the folder, differs from host to host.
        return str(error).replace(str(path), "", 1).lstrip(": ").partition(str(folder))[0].partition(" (")[0].strip()
    finally:
        path.write_text(before, encoding="utf-8")
    return None


# Chat formats, of the kinds of templates that are common, in our own words.

_ANSWER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TEMPLATES = {
    "default-system": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}" + _ANSWER
    ),
    "thoughts": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}" + _ANSWER
    ),
    "headers": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|head|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|end|>\n\n' }}{% endif %}"
    ),
    "dated": (
        "{% if messages[0]['role'] == 'system' %}{% set given, rest = messages[0]['content'] | trim, messages[1:] %}"
        "{% else %}{% set given, rest = '', messages %}{% endif %}"
        "{{ '<|head|>system<|end|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + given + '<|eot|>' }}"
        "{% for m in rest %}{{ '<|head|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|end|>\n\n' }}{% endif %}"
    ),
    "no-system": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '<turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\n' + m['content'] | trim }}"
        "{{ '</turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
    ),
    "filled": (
        "{% for m in messages %}{{ '[' + m['role'] + '] ' + (m['content'] or 'nothing') + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
    ),
}
SPECIAL_TOKENS = {"bos_token": "<s>"}
_TODAY = datetime.date(2026, 2, 3)
_CONVERSATIONS = (
    (("user", "Hello"),),
    (("system", "Be brief."), ("user", " two\n\nlines \u3000\u001c")),
    (("user", "\u00e9 \u6f22 \U0001f600"), ("assistant", "\n a \t"), ("user", "b")),
    (("system", "s"), ("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4"), ("user", "5")),
    (("user", "1"), ("assistant", "deep</think>short"), ("user", "3")),
    (("user", ""),),
    (("user", " \n"), ("assistant", "yes"), ("user", "no")),
    (("user", "1"), ("user", "2")),
    (("user", "1"), ("assistant", "2")),
    (("tool", "1"),),
    (),
)


def chat_formats() -> dict[str, ChatFormat]:
    """Return the chat formats of some templates, by name."""
    found = {name: derive(source, SPECIAL_TOKENS) for name, source in TEMPLATES.items()}
    return {name: form for name, form in found.items() if form is not None}


def chat() -> list[dict[str, Any]]:
    """Return conversations, and the prompt text of each or what is said of it; the bundle has the format.

    `today`, where it isn't null, is the day: year, month, day.
    """
    return [
        _chat_case(name, form, [{"role": role, "content": content} for role, content in conversation])
        for name, form in chat_formats().items()
        for conversation in _CONVERSATIONS
    ]


def _chat_case(name: str, form: ChatFormat, messages: list[dict[str, str]]) -> dict[str, Any]:
    today = "" if form.date is None else _TODAY.strftime(form.date)
    try:
        text, error = render(form, messages, today), None
    except RequestError as refusal:
        text, error = None, str(refusal)
    day = None if form.date is None else [_TODAY.year, _TODAY.month, _TODAY.day]
    return {"bundle": f"chat-{name}", "today": day, "messages": messages, "text": text, "error": error}


# Memory: segments by device, what each device's memory has left, and what is said of it.

_GIB = 2**30
_MEMORY = (
    (("host", 15 * _GIB, (("p", 6 * _GIB, _GIB), ("d", 7 * _GIB, _GIB))),),
    (("host", 15 * _GIB - 1, (("p", 6 * _GIB, _GIB), ("d", 8 * _GIB, 0))),),
    (("cuda:0", 8 * _GIB, (("p", 6 * _GIB, _GIB),)), ("host", 12345678, (("d", 9876543, 3000000),))),
    (("host", 9 * _GIB, (("p", 6 * _GIB, 0),)), ("host", 9 * _GIB, (("d", 3 * _GIB, 1),))),
    (("openvino:GPU", None, (("p", 2**60, 2**50),)),),
)


def memory(bundles: Path) -> dict[str, Any]:
    """Return what fits, what is said where it doesn't, and what segments of bundles take."""
    return {
        "rooms": [_room_case(devices) for devices in _MEMORY],
        "segments": [
            _segment_case(bundles, bundle, name, form)
            for bundle in ("context", "streams")
            for name in read_manifest(bundles / bundle).segments
            for form in Form
        ],
    }


def _room_case(devices: Sequence[Any]) -> dict[str, Any]:
    needs = {str(place): [SegmentMemory(*item) for item in segments] for place, (_, _, segments) in enumerate(devices)}
    free = {str(place): FreeMemory(pool, left) for place, (pool, left, _) in enumerate(devices)}
    try:
        check_room(needs, free.__getitem__)
        error = None
    except DeviceError as refusal:
        error = str(refusal)
    listed = [{"pool": pool, "free": left, "segments": segments} for pool, left, segments in devices]
    return {"devices": listed, "error": error}


def _segment_case(bundles: Path, bundle: str, name: str, form: Form) -> dict[str, Any]:
    found = segment_memory(bundles / bundle, read_manifest(bundles / bundle).segments[name], form, 100)
    sizes = {"weights": found.weight_bytes, "cache": found.cache_bytes}
    return {"bundle": bundle, "segment": name, "form": form.value, "capacity": 100, **sizes}


def small_bundle() -> LookupBundle:
    """Return the bundle whose manifest is edited."""
    return LookupBundle(_CHAIN, _CHAIN, random_table(9, 11, 11), gamma=1, kappa=1, forms=(Form.INPLACE,))


def generations(bundles: Path) -> list[dict[str, Any]]:
    """Return generations with their tokens, by the tables alone, and the rounds of this package's engine.

    Args:
        bundles: the folder that `write_bundles` filled.
    """
    return [_generation_case(item, bundles) for item in GENERATIONS]


@dataclass(frozen=True)
class DraftCase:
    """What a draft says of growing contexts: each turn proposes after one, and rolls out the proposal."""

    bundle: str
    tokens_per_pass: tuple[int, ...] | None = (1,)
    noise: CoupledNoise | None = None
    branches_per_pass: tuple[int, ...] | None = None
    proposal_tokens_per_pass: tuple[int, ...] | None = None
    fanout: tuple[int, ...] | None = None
    turns: tuple[tuple[int, ...], ...] = ((1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 3, 9))


DRAFTS = (
    DraftCase("context"),
    DraftCase("context", noise=CoupledNoise(5, 0.9)),
    DraftCase("streams", (3,)),
    DraftCase("streams", (2, 1, 3)),
    DraftCase("streams", (3, 2), CoupledNoise(6, 1.1)),
    DraftCase("fed"),
    DraftCase("fed", noise=CoupledNoise(7, 0.7)),
    DraftCase("ngram"),
    DraftCase("wide", branches_per_pass=(12, 7, 2), fanout=(5, 3, 2, 1, 4)),
    DraftCase("wide", noise=CoupledNoise(8, 0.9), branches_per_pass=(15, 4, 4, 1), fanout=(5, 3, 2, 1, 4)),
    DraftCase("streams", (2, 1), branches_per_pass=(9, 3, 1), proposal_tokens_per_pass=(3,)),
    DraftCase("streams", (1,), CoupledNoise(6, 1.1), (8, 8, 5), (2, 3), (3, 1, 2, 0, 3, 3)),
    DraftCase("streams", (3,), proposal_tokens_per_pass=(1,)),
    DraftCase("fed", branches_per_pass=(6, 4, 1)),
    DraftCase("tuned", None),
    DraftCase("tuned", None, branches_per_pass=(10, 2)),
    DraftCase("tuned", (2, 1)),
)


def drafts(bundles: Path) -> list[dict[str, Any]]:
    """Return what drafts propose and roll out, token by token."""
    return [_draft_case(item, bundles / item.bundle) for item in DRAFTS]


def _draft_case(item: DraftCase, folder: Path) -> dict[str, Any]:
    manifest = read_manifest(folder)
    given = {
        "tokens_per_pass": item.tokens_per_pass,
        "branches_per_pass": item.branches_per_pass,
        "proposal_tokens_per_pass": item.proposal_tokens_per_pass,
        "fanout": item.fanout,
    }
    options = EngineOptions(candidates=CandidateSource.DRAFT, threads=1, **given)
    plan = make_plan(manifest, options, shared_cpu=True)
    draft = load_draft(folder, manifest, CpuDevice(), plan)
    return {
        "bundle": item.bundle,
        **given,
        "noise": None if item.noise is None else {"seed": str(item.noise.seed), "temperature": item.noise.temperature},
        "turns": [_draft_turn(draft, plan.gamma, context, item.noise) for context in item.turns],
    }


def exit_states(first: int, count: int) -> np.ndarray:
    """Return stand-ins for exit states, float32 [count, 4]: (p % 5 + 1, 3 * p % 7, 0, 0) at position p."""
    positions = first + np.arange(count)
    zeros = np.zeros(count)
    return np.stack([positions % 5 + 1, 3 * positions % 7, zeros, zeros], axis=1).astype(np.float32)


def _draft_turn(draft: Draft, gamma: int, context: tuple[int, ...], noise: CoupledNoise | None) -> dict[str, Any]:
    tokens = np.array(context, np.int64)
    # As an engine does: what the draft has read of another context is forgotten, and states come before they are used.
    draft.keep(3)
    draft.see_states(0, exit_states(0, len(context) - 1))
    proposed = draft.propose(tokens, gamma, noise).read().tokens
    window = np.array([context[-1], *proposed], np.int64)

    def rolled_out(outcome: Outcome | None) -> Rollout:
        meeting = Meeting()
        meeting.state(exit_states(len(context) - 1, window.size))
        if outcome is not None:
            meeting.decide(outcome)
        return draft.roll_out(tokens, window, gamma, meeting, noise)

    rollout = rolled_out(None)
    branches = _pairs(rollout.branches)
    # The last of a position's, at the last position: one that limits leave out early.
    taken = branches[-1] if branches else None
    return {
        "context": context,
        "proposed": proposed,
        "branches": branches,
        "continuations": _lines(rollout),
        "decided": taken and {"outcome": taken, "continuations": _lines(rolled_out(Outcome(*taken)))},
    }


def _lines(rollout: Rollout) -> list[list[int]]:
    return [
        line[:length] for line, length in zip(rollout.continuations.tolist(), rollout.lengths.tolist(), strict=True)
    ]


def _modes(spec: LookupBundle) -> list[str]:
    return ["plain"] if spec.draft is None and spec.draft_kind == "model" else ["plain", "serial", "mirror"]


def engine_rounds(item: Generation, bundles: Path) -> dict[str, list[list[Any]]]:
    """Return by mode what each round proposed, accepted, committed, whether it was reused, and its branches."""
    modes, found = _modes(BUNDLES[item.bundle]), {}
    with mirror.load(bundles / item.bundle, mode=modes[-1], candidates="both", threads=1, **item.passes) as engine:
        for mode in modes:
            result = engine.generate_tokens(
                item.prompt, max_new_tokens=item.max_new_tokens, mode=mode, **asdict(item.sampling)
            )
            found[mode] = [[r.proposed, r.accepted, r.committed, r.reused, r.branches] for r in result.rounds]
    return found


def _generation_case(item: Generation, bundles: Path) -> dict[str, Any]:
    spec = BUNDLES[item.bundle]
    room = spec.max_length - len(item.prompt)
    tokens = oracle_tokens(spec, item.prompt, min(item.max_new_tokens, room), item.sampling)
    stopped = tokens[-1] in spec.eos
    return {
        "bundle": item.bundle,
        "prompt": item.prompt,
        "max_new_tokens": item.max_new_tokens,
        "sampling": _sampling(item.sampling),
        **item.passes,
        "modes": _modes(spec),
        "tokens": tokens,
        "finish_reason": (FinishReason.STOP if stopped else FinishReason.LENGTH).value,
        "rounds": engine_rounds(item, bundles),
    }


def oracle_tokens(spec: LookupBundle, prompt: Sequence[int], count: int, params: SamplingParams) -> list[int]:
    """Return the continuation of a prompt by the target's table and the law of sampling alone."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count and (len(tokens) == len(prompt) or tokens[-1] not in spec.eos):
        sampler = Sampler(params, spec.target.vocab_size, np.array(tokens))
        tokens.append(sampler.choose(oracle_logits(spec.target, tokens), len(tokens)))
    return tokens[len(prompt) :]


def contents() -> dict[str, Any]:
    """Return what each file holds, by its name."""
    with tempfile.TemporaryDirectory() as folder:
        bundles = Path(folder)
        write_bundles(bundles)
        return {
            "noise": noise(),
            "sampling": sampling(),
            "rounds": rounds(),
            "manifests": manifests(write_bundle(bundles / "small", small_bundle())),
            "generations": generations(bundles),
            "drafts": drafts(bundles),
            "chat": chat(),
            "memory": memory(bundles),
        }


def as_text(content: Any) -> str:
    """Return a file's text: one case a line, so that a change shows as the lines that it touches."""
    if isinstance(content, list):
        return "[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in content) + "\n]\n"
    inner = ",\n".join(f"{json.dumps(key)}: {_value_text(value)}" for key, value in content.items())
    return "{\n" + inner + "\n}\n"


def _value_text(value: Any) -> str:
    return as_text(value).rstrip() if isinstance(value, list) else json.dumps(value, ensure_ascii=False)


def main() -> None:
    """Write the files, or the bundles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundles", type=Path, help="write the bundles into this new folder instead")
    options = parser.parse_args()
    if options.bundles is not None:
        write_bundles(options.bundles)
        return
    for name, content in contents().items():
        (FOLDER / f"{name}.json").write_text(as_text(content), encoding="utf-8")


if __name__ == "__main__":
    main()
