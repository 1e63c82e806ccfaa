"""What a GPU's driver says is left, and a bundle that doesn't fit it."""

from __future__ import annotations

from pathlib import Path

import pytest

import mirror
from mirror.errors import DeviceError
from mirror.targets.memory import cuda_free_bytes
from tests.lookup import Lookup, LookupBundle, random_table, write_bundle

MIB = 2**20
LENGTH = 4 * MIB  # tokens; the cache of one takes a few bytes in a lookup bundle


@pytest.mark.gpu
def test_what_a_gpu_has_no_room_for_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    bundle = write_bundle(tmp_path / "bundle", LookupBundle(Lookup(random_table(1, 97, 23)), max_length=LENGTH))
    torch.cuda.init()
    torch.empty(1, device="cuda")
    before = cuda_free_bytes(0)
    assert before is not None
    held = torch.empty(before - 16 * MIB, dtype=torch.uint8, device="cuda")
    left = cuda_free_bytes(0)
    assert left is not None
    assert left < 24 * MIB
    with pytest.raises(DeviceError, match=r"cuda:0 has 0\.\d\d GiB free, these segments need at least .*target_prefix"):
        mirror.load(bundle, mode="plain", target_device="cuda:0")
    del held
    torch.cuda.empty_cache()
    assert (cuda_free_bytes(0) or 0) > left
    with mirror.load(bundle, mode="plain", target_device="cuda:0") as engine:
        assert len(engine.generate_tokens([1, 2, 3], max_new_tokens=4).tokens) == 4
