"""Logits stay where the device left them: only what a choice needs is copied, and every text is the same."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from mirror.errors import DeviceError
from mirror.runtime.logits import Logits
from mirror.runtime.options import EngineOptions
from mirror.runtime.records import Mode
from mirror.runtime.sampling import Sampler, SamplingParams
from mirror.targets.base import Copier, Tensor
from mirror.targets.cpu import CpuDevice
from mirror.targets.onnxruntime_session import Buffer
from mirror.targets.watched import Pass, WatchedDevice
from tests.lookup import Lookup, LookupBundle, agreeing_table, open_engine, oracle_greedy, random_table, write_bundle
from tests.streams import FakeMark

VOCAB = 23
TARGET = Lookup(random_table(1, 97, VOCAB))
PROMPT = [1, 2, 3, 4, 5, 6, 7]
ROW_BYTES = 4 * VOCAB


class _CopyLog:
    """A stream over host memory that notes how many bytes each copy to the host takes."""

    def __init__(self) -> None:
        self.copied: list[int] = []
        self.waits = 0

    def pinned(self, dtype: str, shape: Sequence[int]) -> np.ndarray[Any, Any]:
        return np.zeros(shape, dtype)

    def downloader(self, target: np.ndarray[Any, Any], address: int) -> Copier:
        def download() -> None:
            self.copied.append(target.nbytes)
            ctypes.memmove(target.ctypes.data, address, target.nbytes)

        return download

    def download(self, target: np.ndarray[Any, Any], address: int) -> None:
        self.downloader(target, address)()

    def wait(self) -> None:
        self.waits += 1

    def mark(self) -> FakeMark:
        return FakeMark([])


def on_device(values: np.ndarray[Any, Any], log: _CopyLog) -> Buffer:
    """Return values as a tensor that numpy can't look at."""
    return Buffer(ort.OrtValue.ortvalue_from_numpy(values.copy()), None, log, str(values.dtype))  # type: ignore[arg-type]


def greatest(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(np.isfinite(logits.max(axis=-1)), logits.argmax(axis=-1), -1)


def test_a_part_is_copied_to_its_own_place() -> None:
    log, values = _CopyLog(), np.arange(30, dtype=np.float32).reshape(1, 5, 6)
    tensor = on_device(values, log)
    second, fourth = tensor.numpy_part(6, 6), tensor.numpy_part(20, 1)
    assert second.tolist() == values[0, 1].tolist()
    assert fourth.tolist() == [20]
    assert log.copied == [24, 4]
    assert tensor.shape == (1, 5, 6)


def test_a_part_of_host_memory_is_a_view() -> None:
    values = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    tensor = Buffer(ort.OrtValue.ortvalue_from_numpy(values), values)
    assert np.shares_memory(tensor.numpy_part(3, 3), values)


def test_rows_are_copied_one_by_one_and_once() -> None:
    log, values = _CopyLog(), random_table(3, 4, VOCAB)[None]
    logits = Logits(on_device(values, log))
    for row in (2, 0, 2):
        assert np.array_equal(logits.row(row), values[0, row])
    assert log.copied == [ROW_BYTES, ROW_BYTES]
    # Another row doesn't change those that were read before.
    assert np.array_equal(logits.row(2), values[0, 2])


def test_likeliest_tokens_come_in_one_copy_and_no_logit_with_them() -> None:
    log, values = _CopyLog(), random_table(3, 4, VOCAB)[None]
    logits = Logits(on_device(values, log), on_device(greatest(values), log))
    logits.wait()
    assert log.copied == [4 * 8], "the pass is waited for by reading what is wanted next"
    assert [logits.likeliest(row) for row in range(4)] == values[0].argmax(axis=-1).tolist()
    assert log.copied == [4 * 8]


def test_likeliest_tokens_that_were_fetched_are_those_of_their_own_pass() -> None:
    log, values = _CopyLog(), random_table(3, 4, VOCAB)[None]
    named = on_device(greatest(values), log)
    logits = Logits(on_device(values, log), named)
    logits.fetch()
    named.value.numpy()[...] = 0  # the next pass
    assert [logits.likeliest(row) for row in range(4)] == values[0].argmax(axis=-1).tolist()


@pytest.mark.parametrize("where", ["host", "device without token ids"])
def test_a_graph_without_token_ids_is_searched_row_by_row_and_the_first_of_equals_wins(where: str) -> None:
    log, values = _CopyLog(), np.array([[[0, 9, 9], [5, 5, 4], [1, 2, 3]]], np.float32)
    logits = Logits(values if where == "host" else on_device(values, log))
    logits.wait()
    assert [logits.likeliest(row) for row in (0, 1)] == [1, 0]
    assert log.copied == ([] if where == "host" else [12, 12])
    assert log.waits == (where != "host")


def test_rows_in_host_memory_are_views() -> None:
    values = random_table(3, 4, VOCAB)[None]
    assert np.shares_memory(Logits(values, greatest(values)).row(1), values)


@pytest.mark.parametrize("names_tokens", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_an_error(names_tokens: bool, bad: float) -> None:
    log, values = _CopyLog(), np.full((1, 1, VOCAB), bad, np.float32)
    logits = Logits(on_device(values, log), on_device(greatest(values), log) if names_tokens else None)
    with pytest.raises(DeviceError, match="greatest logit is"):
        Sampler(SamplingParams(), VOCAB, np.array([1])).choose_row(logits, 0, 5)


def test_minus_infinity_everywhere_else_is_no_error() -> None:
    log, values = _CopyLog(), np.full((1, 1, VOCAB), -np.inf, np.float32)
    values[0, 0, 7] = -3
    logits = Logits(on_device(values, log), on_device(greatest(values), log))
    assert Sampler(SamplingParams(), VOCAB, np.array([1])).choose_row(logits, 0, 5) == 7


@pytest.mark.parametrize(
    "params",
    [SamplingParams(1.0, seed=3), SamplingParams(repetition_penalty=1.5), SamplingParams(0.8, top_p=0.9, seed=4)],
)
def test_choices_that_change_the_logits_read_the_row(params: SamplingParams) -> None:
    log, values = _CopyLog(), random_table(3, 4, VOCAB)[None]
    # Token ids that would be wrong, if anybody asked for them.
    logits = Logits(on_device(values, log), on_device(np.zeros((1, 4), np.int64), log))
    for row in range(4):
        expected = Sampler(params, VOCAB, np.array([1, 2])).choose(values[0, row], 9)
        assert Sampler(params, VOCAB, np.array([1, 2])).choose_row(logits, row, 9) == expected
    assert log.copied == [ROW_BYTES] * 4


# The engine.


class _DistantDevice(WatchedDevice):
    """The CPU, with the suffix's logits where numpy can't look at them; with or without token ids."""

    def __init__(self, *, names_tokens: bool = True) -> None:
        super().__init__(CpuDevice(), self._sent_away)
        self.log = _CopyLog()
        self._names_tokens = names_tokens

    def _sent_away(self, item: Pass) -> Mapping[str, Tensor]:
        outputs = item.run()
        if item.segment != "target_suffix":
            return outputs
        logits = np.asarray(outputs["logits"])
        moved: dict[str, Tensor] = {"logits": on_device(logits, self.log)}
        if self._names_tokens:
            moved["token_ids"] = on_device(greatest(logits), self.log)
        return moved


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = LookupBundle(TARGET, Lookup(agreeing_table(TARGET.table, 0.7, 2)), random_table(3, 97, VOCAB))
    return write_bundle(tmp_path_factory.mktemp("logits") / "b", spec)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_greedy_answer_reads_no_row_of_logits(bundle: Path, mode: Mode, pinned: bool) -> None:
    device = _DistantDevice()
    with open_engine(bundle, EngineOptions(mode=mode, pinned=pinned), target=device) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=30)
    assert list(result.tokens) == oracle_greedy(TARGET, PROMPT, 30)
    # One copy a pass, of the token ids of its rows. The prompt's first chunk is not looked at. In plain mode the next
    # pass, launched before anyone reads them, takes them too: a prefix on the host by another copy.
    ahead = len(result.rounds) - 1 if mode is Mode.PLAIN else 0
    assert len(device.log.copied) == 1 + len(result.rounds) + ahead
    assert max(device.log.copied) <= 8 * 8
    prefixes = [span for item in result.rounds for span in item.spans if span.name == "prefix"]
    assert len(prefixes) == len(result.rounds) - ahead


@pytest.mark.parametrize("names_tokens", [True, False])
@pytest.mark.parametrize("mode", list(Mode))
def test_a_sampled_answer_reads_the_rows_up_to_the_first_mismatch(bundle: Path, mode: Mode, names_tokens: bool) -> None:
    near, far = CpuDevice(), _DistantDevice(names_tokens=names_tokens)
    answers = []
    for device in (near, far):
        with open_engine(bundle, EngineOptions(mode=mode), target=device) as engine:
            answers.append(engine.generate_tokens(PROMPT, max_new_tokens=30, temperature=1.0, seed=5))
    assert answers[0].tokens == answers[1].tokens
    looked_at = 1 + sum(item.accepted + 1 for item in answers[1].rounds)
    assert far.log.copied.count(ROW_BYTES) == looked_at
    assert max(far.log.copied) == ROW_BYTES


def test_a_greedy_answer_from_a_graph_without_token_ids_reads_only_rows(bundle: Path) -> None:
    device = _DistantDevice(names_tokens=False)
    with open_engine(bundle, EngineOptions(), target=device) as engine:
        result = engine.generate_tokens(PROMPT, max_new_tokens=30)
    assert list(result.tokens) == oracle_greedy(TARGET, PROMPT, 30)
    assert set(device.log.copied) == {ROW_BYTES}
    # The pass is waited for where its time is counted, not where the first row is read.
    assert device.log.waits == 1 + len(result.rounds)
