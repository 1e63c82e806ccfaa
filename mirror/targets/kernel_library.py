"""The library of this package's own kernels, through its C interfaces (`hosts/kernels`).

It is built with the package where there is a C++ compiler. It runs a draft's pass in one call on x86 CPUs with 8-bit
dot products (AVX-VNNI, AVX-512 VNNI, AMX), draws tokens from rows of logits, and holds operators for NVIDIA GPUs:
products with int4 and int8 weights and attention, of a few rows. This module knows ctypes; nothing else does.
"""

from __future__ import annotations

import ctypes
import functools
import os
import weakref
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_double, c_float, c_int8, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from mirror.errors import DeviceError
from mirror.targets.base import Array
from mirror.targets.draft_program import SIZES, Matrix, Program, ProgramLayer

LIBRARY = Path(__file__).parent / "libmirror_kernels.so"
VARIABLE = "MIRROR_KERNELS"  # of the environment: off, or one of `KERNELS`; the best that there is, if unset
KERNELS = ("amx", "avx512", "avx2")

_VERSION = 2
_OPERATORS = "mirror_operators_missing"
_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "blocks_4": 3, "blocks_8": 4}


class _Matrix(Structure):
    _fields_ = (
        ("values", POINTER(c_int8)),
        ("scales", POINTER(c_float)),
        ("bias", POINTER(c_float)),
        ("in", c_int32),
        ("out", c_int32),
    )


class _Layer(Structure):
    _fields_ = (
        *((name, POINTER(c_float)) for name in ("attention_norm", "query_norm", "key_norm", "mlp_norm")),
        *((name, _Matrix) for name in ("qkv", "output", "gate_up", "down")),
    )


class _Embedding(Structure):
    _fields_ = (("values", c_void_p), ("scales", c_void_p), ("kind", c_int32), ("scale_kind", c_int32))


class _Facts(Structure):
    _fields_ = (
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim", "inner", "layer_count")),
        *((name, c_int32) for name in ("tokens", "streams", "positions")),
        ("epsilon", c_float),
        ("scale", c_float),
        ("embedding", _Embedding),
        ("stream_rows", POINTER(c_float)),
        ("cosines", POINTER(c_float)),
        ("sines", POINTER(c_float)),
        ("layers", POINTER(_Layer)),
        ("norm", POINTER(c_float)),
        ("head", _Matrix),
        ("vocabulary", POINTER(c_int64)),
    )


class _Law(Structure):
    _fields_ = (
        *((name, c_double) for name in ("temperature", "top_p", "min_p")),
        ("top_k", c_int64),
        ("seed", c_uint64),
    )


class DraftPass(Structure):
    """One pass; pointers as `array.ctypes.data` gives them, to arrays that live until it has run."""

    _fields_ = (
        ("width", c_int32),
        ("past", c_int32),
        ("capacity", c_int32),
        ("ids", c_void_p),  # int64 [width]
        ("positions", c_void_p),  # int64 [width]
        ("visible", c_void_p),  # int32 [width]
        ("row_branch", c_void_p),  # int32 [width]
        ("slot_branch", c_void_p),  # int32 [capacity]
        ("keys", c_void_p),  # addresses of each layer's float32 [kv_heads, capacity, head_dim]
        ("values", c_void_p),
        ("wanted", c_int32),
        ("wanted_rows", c_void_p),  # int64 [wanted]
        ("top", c_int32),
        ("token_ids", c_void_p),  # int64 [wanted], written
        ("candidate_ids", c_void_p),  # int64 [wanted, top], written
        ("candidate_logprobs", c_void_p),  # float32 [wanted, top], written
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the library, None where it was not built or is another version's."""
    if not LIBRARY.is_file():
        return None
    library = ctypes.CDLL(str(LIBRARY))
    if library.mirror_kernels_version() != _VERSION:
        return None
    library.mirror_kernels_of.restype = c_char_p
    library.mirror_kernels_of.argtypes = [c_char_p]
    library.mirror_draft_open.restype = c_void_p
    library.mirror_draft_open.argtypes = [POINTER(_Facts), c_char_p]
    library.mirror_draft_team_open.restype = c_void_p
    library.mirror_draft_team_open.argtypes = [c_int32, c_int32]
    library.mirror_choose.restype = c_int64
    library.mirror_choose.argtypes = [c_void_p, c_int32, POINTER(_Law), c_int64]
    library.mirror_draft_run.argtypes = [c_void_p, c_void_p, POINTER(DraftPass)]
    if hasattr(library, _OPERATORS):
        library.mirror_operators_missing.restype = c_char_p
    for close in (library.mirror_draft_close, library.mirror_draft_team_close):
        close.restype = None
        close.argtypes = [c_void_p]
    return library


def kernels_here(wanted: str = "") -> str | None:
    """Return what this CPU's kernels use, one of `KERNELS`; None where there are none, or not the wanted ones."""
    library = _library()
    found = library.mirror_kernels_of(wanted.encode()) if library is not None else None
    return None if found is None else str(found.decode())


def kernels_missing() -> str | None:
    """Return why this machine has no kernels and what to do, None if it has."""
    if _library() is None:
        return "mirror's kernels were not built; install a C++ compiler (g++ or clang++), then mirror again"
    if kernels_here() is None:
        return "this CPU has no 8-bit dot products (AVX-VNNI, AVX-512 VNNI or AMX) for mirror's kernels"
    return None


def _wanted() -> str:
    """Return what the environment's variable says, in small letters; empty where it isn't set."""
    return os.environ.get(VARIABLE, "").strip().lower()


def chosen_kernels() -> str | None:
    """Return the kernels that drafts run with: the best here, or what the environment's variable names; None for none.

    Raises:
        DeviceError: the variable names something else, or what isn't here.
    """
    wanted = _wanted()
    if wanted == "off":
        return None
    if wanted and wanted not in KERNELS:
        raise DeviceError(f"{VARIABLE} is {wanted}; give one of {', '.join(KERNELS)}, off, or leave it unset")
    found = kernels_here(wanted)
    if wanted and found is None:
        why = kernels_missing() or f"this CPU's best are {kernels_here()}"
        raise DeviceError(f"{VARIABLE} is {wanted} and {why}; leave it unset")
    return found


def row_chooser(
    *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> Callable[[Array, int], int] | None:
    """Return what draws the token of a position from its logits, as docs/sampling.md says; None where it isn't built.

    It takes float32 `[vocab]`, penalties applied, and an absolute position, and returns -1 where the greatest logit is
    no finite number. Other threads run Python meanwhile.

    Args:
        temperature: above 0.
        top_k, top_p, min_p, seed: as `runtime.sampling.SamplingParams` has them.
    """
    library = _library() if _wanted() != "off" else None
    if library is None:
        return None
    law = _Law(temperature, top_p, min_p, top_k, seed)

    def choose(logits: Array, position: int) -> int:
        row = np.ascontiguousarray(logits, np.float32)
        return int(library.mirror_choose(row.ctypes.data, row.size, law, position))

    return choose


def operators_missing() -> str | None:
    """Return why GPUs have no kernels of this package's own and what to do, None if they have.

    CUDA's libraries that come as Python packages must have been loaded: they are looked for by name.
    """
    library = _library()
    if library is None:
        return kernels_missing()
    if not hasattr(library, _OPERATORS):
        return "mirror's kernels for GPUs are built on Linux alone"
    reason = library.mirror_operators_missing()
    return None if reason is None else str(reason.decode())


def unwanted_lack() -> str | None:
    """Return why GPUs compute without mirror's own kernels though nobody said so, None where that isn't so."""
    return None if _wanted() == "off" else operators_missing()


def chosen_operators() -> bool:
    """Whether GPUs compute by this package's own kernels: where they can, unless the variable is `off`."""
    return _wanted() != "off" and operators_missing() is None


class PackedDraft:
    """A draft's weights as the kernels take them, and the threads that run its passes."""

    def __init__(self, program: Program, threads: int, kernels: str, *, spare: bool = False) -> None:
        library = _library()
        if library is None:
            raise DeviceError(str(kernels_missing()))
        facts, kept = _facts(program)
        draft = library.mirror_draft_open(facts, kernels.encode())
        del kept  # the library has its own copies of all but the embedding
        if not draft:
            raise DeviceError(f"the kernels {kernels} can't run a draft of {dict(program.sizes)}; export it again")
        team = library.mirror_draft_team_open(threads, spare)
        self.kernels = kernels
        self.vocabulary = int(program.head.values.shape[1])
        self._library, self._draft, self._team = library, draft, team
        self._embedding = program.embedding
        weakref.finalize(self, _close, library, draft, team)

    def run(self, sizes: DraftPass) -> None:
        """Run one pass; other threads run Python meanwhile.

        Raises:
            DeviceError: the sizes don't fit each other.
        """
        if self._library.mirror_draft_run(self._draft, self._team, sizes):
            raise DeviceError(
                f"the kernels can't run {sizes.width} rows after {sizes.past} in a cache of {sizes.capacity} slots"
            )


def _close(library: ctypes.CDLL, draft: int, team: int) -> None:
    library.mirror_draft_team_close(team)
    library.mirror_draft_close(draft)


def _facts(program: Program) -> tuple[_Facts, list[Array]]:
    """Return a program as the C interface takes it, and what must live until it has been read."""
    kept: list[Array] = []

    def pointer(array: Array | None, dtype: type[np.generic], kind: Any) -> Any:
        if array is None:
            return None
        kept.append(np.ascontiguousarray(array, dtype))
        return kept[-1].ctypes.data_as(POINTER(kind))

    def floats(array: Array | None) -> Any:
        return pointer(array, np.float32, c_float)

    def matrix(given: Matrix) -> _Matrix:
        values = pointer(given.values, np.int8, c_int8)
        return _Matrix(values, floats(given.scales), floats(given.bias), *given.values.shape)

    def layer(given: ProgramLayer) -> _Layer:
        norms = given.attention_norm, given.query_norm, given.key_norm, given.mlp_norm
        matrices = given.qkv, given.output, given.gate_up, given.down
        return _Layer(*map(floats, norms), *map(matrix, matrices))

    table = program.embedding
    embedding = _Embedding(
        table.values.ctypes.data,
        None if table.scales is None else table.scales.ctypes.data,
        _KINDS[table.kind],
        _KINDS[table.scale_kind],
    )
    facts = _Facts(
        **{name: program.sizes[name] for name in SIZES},
        layer_count=len(program.layers),
        epsilon=program.epsilon,
        scale=program.scale,
        embedding=embedding,
        stream_rows=floats(program.stream_rows),
        cosines=floats(program.cosines),
        sines=floats(program.sines),
        layers=(_Layer * len(program.layers))(*map(layer, program.layers)),
        norm=floats(program.norm),
        head=matrix(program.head),
        vocabulary=pointer(program.vocabulary, np.int64, c_int64),
    )
    return facts, kept
