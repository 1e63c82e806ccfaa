"""The bench of draws: rows that are widened, and both ways of drawing on them."""

from __future__ import annotations

import numpy as np
import pytest

from mirror.bench.choices import LAWS, time_law, widened
from mirror.runtime.engine import chooser_for
from mirror.runtime.sampling import SamplingParams


def test_a_widened_row_keeps_its_likeliest_to_itself() -> None:
    row = np.random.default_rng(1).standard_normal(3000).astype(np.float32)
    wide = widened(row, 5000, seed=2)
    np.testing.assert_array_equal(wide[:3000], row)
    assert wide.size == 5000
    assert wide[3000:].max() <= np.sort(row)[-1001]
    np.testing.assert_array_equal(widened(row, 2000, seed=2), row[:2000])


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
def test_both_ways_of_drawing_are_timed_and_agree(law: dict[str, float]) -> None:
    if chooser_for(SamplingParams(1.0)) is None:
        pytest.skip("mirror's kernels were not built")
    rows = [np.random.default_rng(seed).standard_normal(20_000).astype(np.float32) * 3 for seed in range(20)]
    found = time_law(rows, law)
    assert set(found) == {"numpy", "library"}
    assert all(0 < median <= most for median, most in found.values())
