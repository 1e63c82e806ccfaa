"""A draft's segments on this package's own CPU kernels."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mirror.bundle import NOISY_TOKENS, Form, Segment, kv_names
from mirror.errors import DeviceError
from mirror.targets.base import Array, KVCache, LoadRequest, Tensor, to_host
from mirror.targets.draft_program import read_program
from mirror.targets.kernel_library import DraftPass, PackedDraft, chosen_kernels
from mirror.targets.onnxruntime_session import OnnxRuntimeCache

# Candidates of a pass in all: the noise of drawn answers is added to them by the host, in a fraction of a millisecond.
_MOST_CANDIDATES = 4096


class KernelSegment:
    """The window's segment, which gives candidates, or the branches', which gives tokens alone.

    Keys lie in the cache in an order of the kernels' own, so nothing else may read it.
    """

    def __init__(self, segment: Segment, draft: PackedDraft) -> None:
        graph = segment.graphs[Form.INPLACE]
        top = next((spec.shape[2] for spec in graph.outputs if spec.name == "candidate_ids"), 0)
        self.name = segment.name
        self.draft = draft
        self._top = int(top)
        self._names = frozenset(spec.name for spec in graph.inputs if not spec.name.startswith("past_key_values."))
        self._layers = tuple(layer.layer for layer in segment.kv)
        self._results: dict[tuple[int, int, int], tuple[Array, Array, Array]] = {}
        self._addresses: tuple[KVCache, Array, Array] | None = None

    @property
    def widths(self) -> tuple[int, ...] | None:
        """Any."""
        return None

    @property
    def input_names(self) -> frozenset[str]:
        """The catalogue inputs of the graph that it stands for."""
        return self._names

    def run(self, feeds: Mapping[str, Tensor], cache: KVCache | None, past_length: int) -> Mapping[str, Tensor]:
        """Run one pass; see `base.LoadedSegment.run`."""
        keys, values = self._cache_addresses(cache)
        given = [
            np.ascontiguousarray(to_host(feeds[name]), dtype)
            for name, dtype in (
                ("input_ids", np.int64),
                ("position_ids", np.int64),
                ("row_visible", np.int32),
                ("row_branch", np.int32),
                ("slot_branch", np.int32),
            )
        ]
        wanted = np.ascontiguousarray(to_host(feeds["logit_rows"]), np.int64)
        width, capacity = given[0].size, given[-1].size
        top = self._candidates(wanted.size, drawn="inverse_temperature" in feeds)
        results = self._result_arrays(width, wanted.size, top)
        self.draft.run(
            DraftPass(
                width,
                past_length,
                capacity,
                *(array.ctypes.data for array in given),
                keys.ctypes.data,
                values.ctypes.data,
                wanted.size,
                wanted.ctypes.data,
                top,
                *(array.ctypes.data for array in results),
            )
        )
        outputs: dict[str, Tensor] = {"token_ids": results[0]}
        return outputs if not top else {**outputs, "candidate_ids": results[1], "candidate_logprobs": results[2]}

    def _candidates(self, wanted: int, *, drawn: bool) -> int:
        """Return how many candidates each wanted row gets: more than the graph's in drawn answers, which gain by it."""
        if not self._top or not drawn:
            return self._top
        most = min(NOISY_TOKENS, self.draft.vocabulary)
        return max(self._top, min(most, _MOST_CANDIDATES // max(wanted, 1)))

    def _result_arrays(self, width: int, wanted: int, top: int) -> tuple[Array, Array, Array]:
        """Return where a pass's results go, the same for the same sizes."""
        found = self._results.get((width, wanted, top))
        if found is None:
            shape = 1, wanted, top
            found = np.zeros((1, wanted), np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
            self._results[width, wanted, top] = found
        return found

    def _cache_addresses(self, cache: KVCache | None) -> tuple[Array, Array]:
        """Return the addresses of a cache's buffers, uint64 [layers] each: keys, values."""
        if self._addresses is None or self._addresses[0] is not cache:
            if not isinstance(cache, OnnxRuntimeCache):
                raise DeviceError(f"{self.name} keeps a KV cache; run it with one that its own device made")
            keys, values = (
                np.array([cache.address(kv_names("past_key_values", layer)[part]) for layer in self._layers], np.uint64)
                for part in range(2)
            )
            self._addresses = cache, keys, values
        return self._addresses[1], self._addresses[2]


def load_kernel_segment(request: LoadRequest) -> KernelSegment | None:
    """Load a draft's segment; None if its program is of a later format.

    Its two segments share weights and threads, for as long as either lives.

    Raises:
        BundleError: the program can't be read.
        DeviceError: the kernels can't take it.
    """
    segment, kernels = request.segment, chosen_kernels()
    assert segment.program is not None
    assert kernels is not None
    key = request.folder.absolute(), segment.program, request.threads, request.spare, kernels
    draft = _packed.get(key)
    if draft is None:
        program = read_program(request.folder, segment.program)
        if program is None:
            return None
        draft = _packed[key] = PackedDraft(program, request.threads, kernels, spare=request.spare)
    return KernelSegment(segment, draft)


_packed: weakref.WeakValueDictionary[tuple[Path, str, int, bool, str], PackedDraft] = weakref.WeakValueDictionary()
