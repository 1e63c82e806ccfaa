"""What a verification step is compared with."""

from __future__ import annotations

from pathlib import Path

from mirror.bench.gpu_floor import load_step, matrix_shapes
from mirror.bundle import read_manifest
from mirror.export.build import ExportOptions, export_bundle
from mirror.targets import open_device
from tests.families import make_checkpoint


def test_every_matrix_is_counted_once_where_it_is_multiplied(tmp_path: Path) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "llama")
    options = ExportOptions(precision="fp16", max_length=64, allow_failed_check=True)
    manifest = export_bundle(str(checkpoint), tmp_path / "bundle", options).manifest
    shapes = {
        name: list(matrix_shapes(tmp_path / "bundle", manifest, name))
        for name in ("target_prefix", "exit_head", "target_suffix")
    }
    model = manifest.model
    head = (model.vocab_size, model.hidden_size)
    assert shapes["exit_head"] == [head]  # the embedding is looked up, not multiplied with
    assert shapes["target_suffix"].count(head) == 1
    assert head not in shapes["target_prefix"]
    layers = manifest.decoding.exit_layer
    assert len(shapes["target_prefix"]) == 4 * layers  # q, k and v joined, out, gate and up joined, down
    times = load_step(tmp_path / "bundle", read_manifest(tmp_path / "bundle"), open_device("cpu"), 40).times(9)
    assert (times.context, times.max_length) == (9, 40)
    assert min(times.prefix_ms, times.exit_head_ms, times.suffix_ms, times.device_ms, times.engine_ms) > 0
