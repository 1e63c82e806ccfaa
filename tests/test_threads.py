"""Threads of a target and a draft on one CPU, and the draft's own thread."""

import threading
from pathlib import Path

import pytest

from mirror.errors import DraftError
from mirror.runtime.records import Mode
from mirror.runtime.threads import physical_cores, split_threads
from mirror.runtime.worker import DraftSeat
from mirror.targets import cpu
from mirror.targets.cores import allowed_cpus, may_have_amx, may_have_vnni


@pytest.mark.parametrize("total", range(1, 20))
def test_a_shared_cpu_is_never_oversubscribed_in_mirror_mode(total: int) -> None:
    target, draft = split_threads(total, Mode.MIRROR, shared=True)
    assert min(target, draft) >= 1
    assert target + draft == max(total, 2)
    assert target >= draft


@pytest.mark.parametrize("mode", [Mode.PLAIN, Mode.SERIAL])
def test_those_that_take_turns_get_all(mode: Mode) -> None:
    assert split_threads(6, mode, shared=True) == (6, 6)


def test_a_draft_on_the_cpu_leaves_a_core_to_the_thread_that_feeds_a_gpu() -> None:
    assert split_threads(6, Mode.MIRROR, shared=False) == (6, 5)
    assert split_threads(1, Mode.MIRROR, shared=False) == (1, 1)


def test_cores_are_counted() -> None:
    assert 1 <= physical_cores() <= allowed_cpus()


def test_matrix_units_are_assumed_where_nobody_lists_them(tmp_path: Path) -> None:
    for name, flags in (("with", "avx512_bf16 amx_bf16 amx_tile amx_int8"), ("without", "avx512_bf16 avx512_fp16")):
        (tmp_path / name).write_text(f"processor : 0\nflags : fpu {flags}\n", encoding="utf-8")
    assert may_have_amx(tmp_path / "with")
    assert not may_have_amx(tmp_path / "without")
    assert may_have_amx(tmp_path / "absent")


def test_products_of_8_bits_go_around_overflows_only_where_they_must(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way around takes 1.6 times as long."""
    for name, flags in (("new", "avx512_vnni avx2"), ("newer", "avx2 avx_vnni"), ("old", "avx2 avx512f")):
        (tmp_path / name).write_text(f"flags : fpu {flags}\n", encoding="utf-8")
    assert [may_have_vnni(tmp_path / name) for name in ("new", "newer", "old", "absent")] == [True, True, False, True]
    entry = "session.x64quantprecision"
    monkeypatch.setattr(cpu, "may_have_vnni", lambda: False)
    assert cpu.CpuDevice().session_options("draft", 1).get_session_config_entry(entry) == "1"
    monkeypatch.setattr(cpu, "may_have_vnni", lambda: True)
    with pytest.raises(RuntimeError, match=entry):
        cpu.CpuDevice().session_options("draft", 1).get_session_config_entry(entry)


class _Idle:
    """A draft that is never asked."""


def test_jobs_run_in_order_on_one_other_thread() -> None:
    seat = DraftSeat(_Idle(), 5.0)  # type: ignore[arg-type]
    jobs = [seat.start(lambda draft, item=item: (item, threading.get_ident())) for item in range(5)]
    results = [seat.finish(job) for job in jobs]
    assert [item for item, _ in results] == list(range(5))
    assert {thread for _, thread in results} == {results[0][1]} != {threading.get_ident()}
    seat.close()


def test_a_raising_draft_is_lost_with_its_reason() -> None:
    seat = DraftSeat(_Idle(), 5.0)  # type: ignore[arg-type]

    def fail(draft: object) -> None:
        raise ValueError("bad weights")

    with pytest.raises(DraftError, match=r"ValueError: bad weights.*plain mode"):
        seat.finish(seat.start(fail))
    assert "bad weights" in (seat.lost or "")
    seat.close()


def test_a_hung_draft_is_lost_after_the_timeout_and_closing_does_not_wait() -> None:
    seat = DraftSeat(_Idle(), 0.05)  # type: ignore[arg-type]
    never = threading.Event()
    with pytest.raises(DraftError, match=r"no answer within 0.05 s"):
        seat.finish(seat.start(lambda draft: never.wait()))
    seat.close()
    never.set()
