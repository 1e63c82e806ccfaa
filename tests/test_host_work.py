"""The bench of host work runs, and what it adds up is there."""

from pathlib import Path

from mirror.bench.host_work import measure
from tests.lookup import Lookup, LookupBundle, agreeing_table, random_table, write_bundle


def test_it_clocks_both_threads(tmp_path: Path) -> None:
    target = random_table(1, 7, 12)
    spec = LookupBundle(Lookup(target), Lookup(agreeing_table(target, 0.5, 2)), random_table(3, 7, 12), max_length=96)
    found = measure(write_bundle(tmp_path / "b", spec), rounds=40, prompt=[1, 2, 3])
    assert found["rounds"]
    for thread in ("target_thread_ms", "draft_thread_ms"):
        times = found[thread]
        assert isinstance(times, dict)
        assert 0 < times["median"] < 100
