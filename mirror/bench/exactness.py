"""Whether every way of running a bundle gives the same tokens: `python -m mirror.bench.exactness BUNDLE`.

Greedy, the reference is transformers' own float32 generation where a checkpoint is given, else the
plain mode; sampled, and at any pinned width, it is the plain mode. A result keeps transformers' tokens,
so that a later run can take them from there. Every arm is one loaded engine that
answers all prompts in turn. The result is rewritten after each arm, so that a run that is stopped
leaves what it found, marked incomplete.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from mirror.bench.prompts import load_prompts
from mirror.bench.provenance import provenance
from mirror.bundle import Manifest, read_manifest
from mirror.runtime.engine import Engine, Result, load
from mirror.runtime.records import Mode
from mirror.runtime.text import TextCodec

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One prompt as token ids, and the seed that its sampled answers are drawn with."""

    name: str
    prompt: Tokens
    seed: int


@dataclass(frozen=True)
class Law:
    """How a token is chosen; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


GREEDY = Law()
SAMPLED = tuple(Law(temperature, top_p) for temperature in (0.7, 1.0, 1.5) for top_p in (1.0, 0.9))


@dataclass(frozen=True)
class Arm:
    """One way of running a bundle; None takes the bundle's or has no meaning in this mode.

    A plain arm has a gamma only where that sets its width: when it is pinned.
    """

    mode: Mode
    gamma: int | None = None
    candidates: str | None = None
    target_device: str = "cpu"
    draft_device: str | None = None
    kappa: int | None = None
    pinned: bool = False

    @property
    def name(self) -> str:
        """The arm in one line."""
        parts = [
            self.mode.value,
            f"gamma {self.gamma}" if self.gamma else "",
            f"kappa {self.kappa}" if self.kappa else "",
            self.candidates or "",
            f"{self.target_device}+{self.draft_device}" if self.draft_device else self.target_device,
            "pinned" if self.pinned else "",
        ]
        return " ".join(part for part in parts if part)

    @property
    def plain(self) -> Arm:
        """The arm whose tokens this one must repeat."""
        return Arm(Mode.PLAIN, self.gamma if self.pinned else None, pinned=self.pinned)

    def load(self, bundle: Path) -> Engine:
        """Return a loaded engine; the caller closes it."""
        return load(
            bundle,
            mode=self.mode,
            target_device=self.target_device,
            draft_device=self.draft_device or "cpu",
            gamma=self.gamma,
            kappa=self.kappa,
            candidates=self.candidates or "both",
            pinned=self.pinned,
        )


@dataclass(frozen=True)
class Difference:
    """The first token at which two answers part; None where one of them has ended."""

    case: str
    position: int
    expected: int | None
    found: int | None


@dataclass(frozen=True)
class Finding:
    """What an arm did with all prompts under one law.

    Attributes:
        prompts, equal: how many were answered, and how many as the reference.
        first_difference: the first prompt's that differs; None where none does.
        lost_drafts: answers that went on without the draft, which prove nothing.
        tokens: of all answers together; with `rounds` it gives `tokens_per_round`.
    """

    arm: Arm
    law: Law
    reference: str
    prompts: int
    equal: int
    first_difference: Difference | None
    lost_drafts: int
    tokens: int
    tokens_per_round: float | None
    acceptance_rate: float | None
    reuse_rate: float | None
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether every answer is the reference's, made with the draft."""
        return self.equal == self.prompts and self.lost_drafts == 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"name": self.arm.name, "exact": self.exact, **asdict(self), "arm": _arm_json(self.arm)}


@dataclass(frozen=True)
class Answers:
    """An arm's answers to the cases, in their order, and how long they took."""

    results: tuple[Result, ...]
    seconds: float

    @property
    def tokens(self) -> tuple[Tokens, ...]:
        """The tokens alone."""
        return tuple(result.tokens for result in self.results)


def make_cases(bundle: Path, per_kind: int | None = None) -> tuple[Case, ...]:
    """Return the project's prompts as the bundle's tokens, chat template applied."""
    codec = TextCodec.load(bundle)
    prompts = load_prompts(per_kind)
    return tuple(
        Case(f"{item.kind}/{item.name}", tuple(codec.encode_prompt(item.messages, True)), seed)
        for seed, item in enumerate(prompts)
    )


def answer_all(engine: Engine, cases: Sequence[Case], law: Law, tokens: int) -> Answers:
    """Return an engine's answers to all cases, each at most `tokens` long."""
    started_s = time.perf_counter()
    results = tuple(
        engine.generate_tokens(
            case.prompt,
            max_new_tokens=tokens,
            temperature=law.temperature,
            top_p=law.top_p,
            repetition_penalty=law.repetition_penalty,
            seed=case.seed,
        )
        for case in cases
    )
    return Answers(results, time.perf_counter() - started_s)


def first_difference(cases: Sequence[Case], expected: Sequence[Tokens], found: Sequence[Tokens]) -> Difference | None:
    """Return where the first differing answer leaves the expected one."""
    for case, ours, theirs in zip(cases, found, expected, strict=True):
        for position, (mine, right) in enumerate(itertools.zip_longest(ours, theirs)):
            if mine != right:
                return Difference(case.name, position, right, mine)
    return None


def judge(
    arm: Arm, law: Law, cases: Sequence[Case], expected: Sequence[Tokens], answers: Answers, *, reference: str
) -> Finding:
    """Compare an arm's answers with the expected tokens.

    Args:
        reference: what gave the expected tokens.
    """
    statistics = [result.statistics for result in answers.results]
    rounds = [item for result in answers.results for item in result.rounds]
    wanted = [item.reused for item in rounds if item.reused is not None]
    committed = sum(item.committed for item in rounds)
    return Finding(
        arm=arm,
        law=law,
        reference=reference,
        prompts=len(cases),
        equal=sum(ours == theirs for ours, theirs in zip(answers.tokens, expected, strict=True)),
        first_difference=first_difference(cases, expected, answers.tokens),
        lost_drafts=sum(bool(result.events) for result in answers.results),
        tokens=sum(item.generated_tokens for item in statistics),
        tokens_per_round=_share(committed, len(rounds)),
        acceptance_rate=_share(
            sum(item.draft_tokens_accepted for item in statistics),
            sum(item.draft_tokens_proposed for item in statistics),
        ),
        reuse_rate=_share(sum(wanted), len(wanted)),
        seconds=round(answers.seconds, 2),
    )


def transformers_tokens(
    checkpoint: Path, manifest: Manifest, cases: Sequence[Case], tokens: int, *, repetition_penalty: float = 1.0
) -> list[Tokens]:
    """Return what transformers generates greedily in float32, one prompt at a time, end tokens included.

    Args:
        checkpoint: a Hugging Face folder or a GGUF file.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder, file = (checkpoint.parent, checkpoint.name) if checkpoint.is_file() else (checkpoint, None)
    extra: dict[str, Any] = {"gguf_file": file} if file else {}
    # Any: transformers' own annotations don't allow the calls that its documentation shows.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra)
    make_config: Any = GenerationConfig
    config = make_config(
        do_sample=False,
        max_new_tokens=tokens,
        repetition_penalty=repetition_penalty,
        eos_token_id=list(manifest.tokens.eos) or None,
        pad_token_id=manifest.tokens.pad or 0,
    )
    # The checkpoint's own config would fill in what this one leaves open.
    model.generation_config = config
    answers = []
    for case in cases:
        ids = torch.tensor([case.prompt])
        # The mask is given because a pad token that is also the end token would be masked in the prompt.
        made = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        answers.append(tuple(made[0, ids.shape[1] :].tolist()))
    return answers


def make_arms(
    gammas: Sequence[int], sources: Sequence[str], draft_devices: Sequence[str], kappa: int | None, *, pinned: bool
) -> tuple[Arm, ...]:
    """Return the plain arms and, for every window and draft device, serial and each candidate source."""
    plain = dict.fromkeys(Arm(Mode.PLAIN, gamma, pinned=pinned).plain for gamma in gammas)
    drafted = []
    for device, gamma in itertools.product(draft_devices, gammas):
        drafted.append(Arm(Mode.SERIAL, gamma, None, "cpu", device, None, pinned))
        drafted += [Arm(Mode.MIRROR, gamma, source, "cpu", device, kappa, pinned) for source in sources]
    return (*plain, *drafted)


def run_matrix(
    bundle: Path,
    arms: Sequence[Arm],
    laws: Sequence[Law],
    cases: Sequence[Case],
    tokens: int,
    given: Mapping[Law, Sequence[Tokens]],
) -> Iterator[Finding]:
    """Run arms one after the other and yield what each did under each law; plain arms come first.

    Args:
        given: expected tokens from elsewhere, by law; where there are none, the plain arm's.
    """
    known: dict[tuple[Arm, Law], Sequence[Tokens]] = {}
    for arm in arms:
        with arm.load(bundle) as engine:
            for law in laws:
                answers = answer_all(engine, cases, law, tokens)
                if arm == arm.plain:
                    known[arm, law] = answers.tokens
                expected = given.get(law, known[arm.plain, law])
                name = "transformers" if law in given else arm.plain.name
                yield judge(arm, law, cases, expected, answers, reference=name)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--reference", type=click.Path(path_type=Path, exists=True), help="Checkpoint for transformers, or its result."
)
@click.option("--sampled", is_flag=True, help="Temperatures 0.7, 1 and 1.5, top-p 1 and 0.9, instead of greedy.")
@click.option("--pinned", is_flag=True, help="Pinned widths; the reference is plain at the same width.")
@click.option("--tokens", default=96, help="The most tokens of an answer.")
@click.option("--per-kind", type=click.IntRange(min=1), help="Prompts of each kind; all 4 if not given.")
@click.option("--gammas", default="1,3,7")
@click.option("--candidates", "sources", default="exit,draft,both")
@click.option("--draft-devices", default="cpu,openvino:CPU")
@click.option("--kappa", type=int, help="Branches per position; the bundle's if not given.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the JSON result goes.")
def main(
    bundle: Path,
    reference: Path | None,
    sampled: bool,
    pinned: bool,
    tokens: int,
    per_kind: int | None,
    gammas: str,
    sources: str,
    draft_devices: str,
    kappa: int | None,
    out: Path | None,
) -> None:
    """Compare the tokens of every arm on the project's prompts; exit 1 if any differs."""
    if reference is not None and (sampled or pinned):
        raise click.UsageError("--reference is transformers' greedy float32 text; leave out --sampled and --pinned")
    manifest, cases = read_manifest(bundle), make_cases(bundle, per_kind)
    arms = make_arms(
        [int(gamma) for gamma in gammas.split(",")], sources.split(","), draft_devices.split(","), kappa, pinned=pinned
    )
    given: dict[Law, Sequence[Tokens]] = {}
    if reference is not None:
        given[GREEDY] = _expected(reference, manifest, cases, tokens)
    report = _Report(
        out, _facts(manifest, cases, tokens), given.get(GREEDY), len(arms) * (len(SAMPLED) if sampled else 1)
    )
    for finding in run_matrix(bundle, arms, SAMPLED if sampled else (GREEDY,), cases, tokens, given):
        report.add(finding)
    sys.exit(0 if report.exact else 1)


def _expected(reference: Path, manifest: Manifest, cases: Sequence[Case], tokens: int) -> Sequence[Tokens]:
    """Return transformers' tokens, from a checkpoint or from an earlier result of this program."""
    if reference.suffix != ".json":
        return transformers_tokens(reference, manifest, cases, tokens)
    data = json.loads(reference.read_text(encoding="utf-8"))
    known = dict(zip(data["prompts"], data["transformers_tokens"] or (), strict=False))
    same = (data["model"]["fingerprint"], data["max_new_tokens"]) == (manifest.model.fingerprint, tokens)
    if not same or not all(case.name in known for case in cases):
        raise click.UsageError(f"{reference} has other tokens than these prompts need; give the checkpoint")
    return [tuple(json.loads(known[case.name])) for case in cases]


class _Report:
    """The result file, rewritten with every finding."""

    def __init__(
        self, path: Path | None, facts: Mapping[str, Any], expected: Sequence[Tokens] | None, findings: int
    ) -> None:
        self._path, self._facts, self._expected, self._all = path, facts, expected, findings
        self._findings: list[Finding] = []

    @property
    def exact(self) -> bool:
        """Whether all findings so far are exact."""
        return all(finding.exact for finding in self._findings)

    def add(self, finding: Finding) -> None:
        """Take a finding in, print it and write the file."""
        self._findings.append(finding)
        click.echo(_sentence(finding))
        if self._path is None:
            return
        data = {
            **self._facts,
            "complete": len(self._findings) == self._all,
            "exact": self.exact,
            "arms": [item.to_json() for item in self._findings],
            "transformers_tokens": None if self._expected is None else [json.dumps(item) for item in self._expected],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_name(self._path.name + ".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self._path)


def _facts(manifest: Manifest, cases: Sequence[Case], tokens: int) -> dict[str, Any]:
    return {
        "what": "tokens of every arm against its reference",
        **provenance("mirror.bench.exactness"),
        "model": {
            "source": Path(manifest.producer.source).name,
            "precision": manifest.model.precision,
            "fingerprint": manifest.model.fingerprint,
            "draft": None if manifest.draft is None else manifest.draft.source,
            "exit_layer": manifest.decoding.exit_layer,
            "kappa": manifest.decoding.kappa,
        },
        "prompts": [case.name for case in cases],
        "max_new_tokens": tokens,
    }


def _arm_json(arm: Arm) -> dict[str, Any]:
    return asdict(arm) | {"mode": arm.mode.value}


def _sentence(finding: Finding) -> str:
    law, apart = finding.law, finding.first_difference
    chosen = "greedy" if law == GREEDY else f"temperature {law.temperature} top-p {law.top_p}"
    rate = "" if finding.tokens_per_round is None else f", {finding.tokens_per_round:.2f} tokens per round"
    where = "" if apart is None else f"; {apart.case} differs first, at token {apart.position}"
    lost = f"; the draft was lost {finding.lost_drafts} times" if finding.lost_drafts else ""
    return (
        f"{finding.arm.name}, {chosen}: {finding.equal} of {finding.prompts} as {finding.reference}"
        f"{rate}, {finding.seconds:.0f} s{where}{lost}"
    )


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


if __name__ == "__main__":
    main()
