"""Text calls, streamers, and conversations that keep their cache, on a lookup model with a real tokenizer."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from mirror.errors import RequestError
from mirror.runtime.candidates import CandidateSource
from mirror.runtime.engine import Engine
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import FinishReason, Mode
from tests.lookup import Lookup, LookupBundle, agreeing_table, open_engine, oracle_greedy, random_table, write_bundle

VOCAB = 23
WORDS = [f"w{token}" for token in range(VOCAB - 1)] + ["<end>"]
TARGET = Lookup(random_table(1, 97, VOCAB))
DRAFT = Lookup(agreeing_table(TARGET.table, 0.7, 2))
TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}{% if add_generation_prompt %}w0{% endif %}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = LookupBundle(TARGET, DRAFT, random_table(3, 97, VOCAB), eos=(VOCAB - 1,), max_length=100)
    folder = write_bundle(tmp_path_factory.mktemp("text") / "b", spec)
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token="w1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(params=list(Mode))
def engine(bundle: Path, request: pytest.FixtureRequest) -> Engine:
    with open_engine(bundle, EngineOptions(mode=request.param)) as engine:
        yield engine  # type: ignore[misc]


def _words(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens if token != VOCAB - 1)


PROMPT = "w4 w9"
ANSWER = oracle_greedy(TARGET, [4, 9, 0], 30, eos=(VOCAB - 1,))


def test_generate_gives_text_and_tokens(engine: Engine) -> None:
    result = engine.generate(PROMPT, max_new_tokens=30)
    assert list(result.tokens) == ANSWER
    assert result.text == _words(ANSWER)
    assert result.prompt_tokens == 3
    assert engine.generate([{"role": "user", "content": PROMPT}], max_new_tokens=30).text == result.text
    raw = engine.generate(PROMPT, max_new_tokens=30, apply_chat_template=False)
    assert list(raw.tokens) == oracle_greedy(TARGET, [4, 9], 30, eos=(VOCAB - 1,))


def test_stream_gives_the_same_text_in_pieces_and_then_the_result(engine: Engine) -> None:
    stream = engine.stream(PROMPT, max_new_tokens=30)
    assert stream.result is None
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == _words(ANSWER)
    assert stream.result is not None
    assert list(stream.result.tokens) == ANSWER


def test_a_callable_streamer_gets_everything_and_true_stops(engine: Engine) -> None:
    pieces: list[str] = []
    result = engine.generate(PROMPT, max_new_tokens=30, streamer=pieces.append)
    assert "".join(pieces) == result.text == _words(ANSWER)
    some: list[str] = []

    def stop_at_second(text: str) -> bool:
        some.append(text)
        return len(some) == 2

    cut = engine.generate(PROMPT, max_new_tokens=30, streamer=stop_at_second)
    assert cut.finish_reason is FinishReason.CANCELLED
    assert 0 < len(cut.tokens) < len(ANSWER)
    assert list(cut.tokens) == ANSWER[: len(cut.tokens)]


def test_an_object_streamer_is_ended_once_also_by_an_error(engine: Engine) -> None:
    class Sink:
        def __init__(self, fails: bool) -> None:
            self.pieces: list[str] = []
            self.ends = 0
            self.fails = fails

        def write(self, text: str) -> None:
            self.pieces.append(text)
            if self.fails:
                raise ValueError("disk full")

        def end(self) -> None:
            self.ends += 1

    good, bad = Sink(False), Sink(True)
    engine.generate(PROMPT, max_new_tokens=30, streamer=good)
    assert ("".join(good.pieces), good.ends) == (_words(ANSWER), 1)
    with pytest.raises(ValueError, match="disk full"):
        engine.generate(PROMPT, max_new_tokens=30, streamer=bad)
    assert bad.ends == 1
    assert list(engine.generate(PROMPT, max_new_tokens=30).tokens) == ANSWER


def test_a_stop_string_ends_text_and_tokens_at_the_same_place_in_every_mode(engine: Engine) -> None:
    stop = f"{WORDS[ANSWER[7]]} {WORDS[ANSWER[8]]}"
    first = next(i for i in range(len(ANSWER)) if _words(ANSWER[: i + 1]).endswith(stop))
    result = engine.generate(PROMPT, max_new_tokens=30, stop=[stop])
    assert result.finish_reason is FinishReason.STOP
    assert list(result.tokens) == ANSWER[: first + 1]
    assert result.text == _words(ANSWER)[: _words(ANSWER).index(stop)]
    with pytest.raises(RequestError, match="pass a list"):
        engine.generate(PROMPT, stop="w1")


def test_a_conversation_runs_only_what_is_new(engine: Engine) -> None:
    conversation = engine.conversation([{"role": "system", "content": "w2 w3"}])
    context, shared = [2, 3], 0
    for said in (["w5", "w6"], ["w7"], ["w8", "w2", "w2"]):
        result = conversation.say(" ".join(said), max_new_tokens=6)
        context += [WORDS.index(word) for word in said]
        expected = oracle_greedy(TARGET, [*context, 0], 6, eos=(VOCAB - 1,))
        assert list(result.tokens) == expected
        # The template's last word was cached before the answer, which now stands in its place.
        assert result.statistics.reused_prompt_tokens == shared
        shared = len(context)
        context += [token for token in expected if token != VOCAB - 1]
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["system", *itertools.chain.from_iterable([("user", "assistant")] * 3)]


def test_another_answer_between_the_turns_does_no_harm(engine: Engine) -> None:
    alone, disturbed = engine.conversation(), engine.conversation()
    expected = [alone.say(text, max_new_tokens=6).tokens for text in ("w5 w6", "w7")]
    found = [disturbed.say("w5 w6", max_new_tokens=6).tokens]
    engine.generate("w9 w9 w9 w9", max_new_tokens=12)
    found.append(disturbed.say("w7", max_new_tokens=6).tokens)
    assert found == expected


def test_a_plain_turn_between_two_others_does_not_mislead_the_draft(tmp_path: Path, bundle: Path) -> None:
    """The draft isn't asked in plain mode, yet its cache must follow the context: a perfect one stays perfect."""
    folder = write_bundle(tmp_path / "b", LookupBundle(TARGET, TARGET, random_table(3, 97, VOCAB), max_length=100))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(bundle / name, folder / name)
    for mode in ("serial", "mirror"):
        with open_engine(folder, EngineOptions(candidates=CandidateSource.DRAFT)) as engine:
            engine.conversation().say("w5 w6 w7 w8 w9", max_new_tokens=20, mode=mode)
            other = engine.conversation()
            other.say("w5 w6 w1 w2 w3", max_new_tokens=8, mode="plain")
            result = other.say("w4", max_new_tokens=21, mode=mode)
        assert result.statistics.reused_prompt_tokens == 5
        assert result.statistics.acceptance_rate == 1.0


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(engine: Engine) -> None:
    conversation = engine.conversation()
    conversation.say("w5", max_new_tokens=3)
    before = list(conversation.messages)
    with pytest.raises(RequestError):
        conversation.say("w6", max_new_tokens=0)
    assert conversation.messages == before


def test_json_has_the_names_that_the_glossary_promises(engine: Engine) -> None:
    data = json.loads(json.dumps(engine.generate(PROMPT, max_new_tokens=5).to_json()))
    assert set(data) == {"text", "tokens", "finish_reason", "statistics", "events"}
    assert data["finish_reason"] in ("length", "stop")
    assert {"tokens_per_round", "reuse_rate", "ttft_s", "acceptance_rate"} <= set(data["statistics"])
