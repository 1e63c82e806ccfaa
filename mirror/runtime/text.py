"""Text in and text out: the tokenizer, the chat template, and the stream of an answer.

Two promises of a stream: the texts it gives, joined, are the decoding of all its tokens, and they
don't depend on how the tokens were grouped into pushes. So a text is the same in every mode. Knows
strings and token ids; never tensors, sessions or rounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mirror.errors import BundleError, RequestError
from mirror.runtime.chat_template import ChatTemplate, check_messages

TOKENIZER_FILE = "tokenizer.json"
REPLACEMENT = "\ufffd"  # stands for bytes that aren't UTF-8, or aren't yet
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
WINDOW_TOKENS = 16  # a stream decodes at least this many tokens again before it lets go of them

Messages = Sequence[Mapping[str, str]]


class TextCodec:
    """The tokenizer and chat template of a bundle."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None = None) -> None:
        """Wrap a tokenizer, whose truncation and padding are turned off."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._template = template
        self._special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self._byte_fallback = _has_byte_fallback(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> TextCodec:
        """Return the codec of a bundle folder.

        Raises:
            BundleError: `tokenizer.json` is missing or unreadable.
        """
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            raise BundleError(
                f"{folder} has no {TOKENIZER_FILE}; export the bundle again from a model with a fast tokenizer,"
                " or work with tokens"
            )
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path} is not a readable tokenizer ({error}); export the bundle again") from error
        return cls(tokenizer, ChatTemplate.load(folder))

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brings a chat template."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer adds around it.

        Raises:
            RequestError: the text holds lone surrogates, which no encoding has.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the text is not valid Unicode ({error}); read it as UTF-8") from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens and ids that the tokenizer doesn't know."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def render(self, messages: Messages) -> str:
        """Return messages as prompt text, ending where the assistant's answer begins.

        Raises:
            RequestError: the model has no chat template, or it refuses the messages.
        """
        if self._template is None:
            raise RequestError(
                "this model has no chat template, so a list of messages can't be rendered; pass the prompt as a string"
            )
        return self._template.render(messages)

    def encode_prompt(self, prompt: str | Messages, apply_chat_template: bool) -> list[int]:
        """Return the token ids of a prompt.

        A string counts as one user message where the model has a chat template, and stays as it is
        where it has none (a base model continues text) or `apply_chat_template` is False.

        Raises:
            RequestError: the prompt is empty, or messages can't be rendered.
        """
        if isinstance(prompt, str):
            tokens = self._encode_string(prompt, apply_chat_template)
        else:
            tokens = self._encode_messages(prompt, apply_chat_template)
        if not tokens:
            raise RequestError("the prompt has no tokens; pass a text that isn't empty")
        return tokens

    def shows(self, token: int) -> bool:
        """Return whether a token can be part of a text: it isn't special, and the tokenizer knows it."""
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def is_byte(self, token: int) -> bool:
        """Return whether a token is one byte of a group that is decoded as a whole.

        Neighbouring `<0xE4>` tokens of a byte-fallback tokenizer make a group; one that isn't UTF-8
        decodes to replacement characters altogether, so nothing of it is settled before it ends.
        """
        return self._byte_fallback and BYTE_TOKEN.fullmatch(self._tokenizer.id_to_token(token) or "") is not None

    def _encode_string(self, prompt: str, apply_chat_template: bool) -> list[int]:
        if apply_chat_template and self._template is not None:
            return self._encode_messages([{"role": "user", "content": prompt}], True)
        return self.encode(prompt)

    def _encode_messages(self, messages: Messages, apply_chat_template: bool) -> list[int]:
        check_messages(messages)
        if not apply_chat_template:
            raise RequestError("a list of messages needs the chat template; pass the prompt as one string without it")
        # The template writes the special tokens itself; the tokenizer would add them twice.
        return self.encode(self.render(messages), add_special_tokens=False)


class TextStream:
    """The text of an answer as its tokens commit.

    Never gives half a character, nor text that could still become a stop string. A stop string and
    what follows it is dropped.

    `tokenizers.decoders.DecodeStream` is not used: it waits for a trailing U+FFFD to go away, which
    real U+FFFD and broken UTF-8 never do, and byte-fallback groups change after it showed them.
    """

    def __init__(self, codec: TextCodec, stop: Sequence[str] = ()) -> None:
        """Start an empty text.

        Raises:
            RequestError: a stop string is empty.
        """
        self._decoder = _StreamDecoder(codec)
        self._filter = _StopFilter(stop)
        self._shown: list[str] = []
        self._kept_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed."""
        return self._filter.stopped

    @property
    def text(self) -> str:
        """The text so far: everything that `push` and `finish` returned."""
        return "".join(self._shown)

    @property
    def kept_tokens(self) -> int:
        """How many pushed tokens count: all, or those up to the one that completed a stop string."""
        return self._kept_tokens

    def push(self, tokens: Sequence[int]) -> str:
        """Take committed tokens and return the text that they settle, which may be empty.

        Tokens after the one that completes a stop string are ignored.
        """
        # One token at a time: where a stop string is found must not depend on the grouping.
        pieces = []
        for token in tokens:
            if self.stopped:
                break
            self._kept_tokens += 1
            pieces.append(self._filter.feed(self._decoder.feed(int(token))))
        return self._show("".join(pieces))

    def finish(self) -> str:
        """Return the text that was held back; the answer ends here. A second call returns nothing."""
        if self.stopped:
            return ""
        return self._show(self._filter.feed(self._decoder.flush()) + self._filter.flush())

    def _show(self, text: str) -> str:
        if text:
            self._shown.append(text)
        return text


class _StreamDecoder:
    """Tokens to settled text, one token at a time.

    Holds the visible tokens since a clean boundary, one with no character and no byte group open.
    The decoding of `_tokens` begins with `_given` characters that were given already: they are the
    context that takes upon itself what a decoder does to a first token, as dropping its space.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._tokens: list[int] = []
        self._given = 0
        self._boundary = 0  # how many of the tokens stand before the last clean boundary

    def feed(self, token: int) -> str:
        if not self._codec.shows(token):
            return ""
        self._tokens.append(token)
        if self._codec.is_byte(token):
            return ""
        text = self._codec.decode(self._tokens)
        # A trailing U+FFFD may be the beginning of a character; what stands before it is decided.
        settled = text.rstrip(REPLACEMENT)
        new = self._give(settled)
        if settled == text:
            self._let_go()
        return new

    def flush(self) -> str:
        return self._give(self._codec.decode(self._tokens))

    def _give(self, text: str) -> str:
        new = text[self._given :]
        self._given += len(new)
        return new

    def _let_go(self) -> None:
        """Forget the tokens before the last clean boundary, when there are enough of them."""
        if self._boundary >= WINDOW_TOKENS:
            context = self._tokens[self._boundary :]
            given = len(self._codec.decode(context))
            # A context that shows nothing, as a lone dropped space, would leave that to the next token.
            if given:
                self._tokens, self._given = context, given
        self._boundary = len(self._tokens)


class _StopFilter:
    """Passes text on until a stop string completes, holding back what may become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        if isinstance(stop, str):
            raise RequestError(f"stop is the string {stop!r}; pass a list of strings")
        if any(not text for text in stop):
            raise RequestError("a stop string is empty, so nothing could ever be generated; remove it")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        if not self._stop or not text:
            return text
        pending = self._held + text
        # The stop string that ends first wins; of two that end together, the longer.
        found = [(start + len(stop), start) for stop in self._stop if (start := pending.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return pending[: min(found)[1]]
        kept = len(pending) - self._undecided(pending)
        self._held = pending[kept:]
        return pending[:kept]

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Return the length of the longest end of a text that some stop string begins with."""
        longest = min(len(text), max(map(len, self._stop)) - 1)
        return next((size for size in range(longest, 0, -1) if self._stop_begins_with(text[-size:])), 0)

    def _stop_begins_with(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stop)


def _has_byte_fallback(tokenizer: tokenizers.Tokenizer) -> bool:
    decoder = tokenizer.decoder
    return decoder is not None and "ByteFallback" in _kinds(json.loads(decoder.__getstate__()))


def _kinds(decoder: Mapping[str, Any]) -> set[str]:
    """Return the kinds of a decoder's stages, sequences opened up."""
    if decoder["type"] != "Sequence":
        return {decoder["type"]}
    return {kind for part in decoder["decoders"] for kind in _kinds(part)}
