"""Products with int4, int8 and float16 weights on a GPU, by rows: `python -m mirror.bench.gpu_products --out FILE`.

Sessions of ONNX Runtime with some matrices of one size each, replayed as CUDA graphs, so that launching costs nothing
and no matrix is found in the GPU's cache. Beside mirror's own kernels: ONNX Runtime's, and its other ones for few rows
of int4 (`fpa_intb`). In float16 mirror has kernels for small matrices alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from mirror.bench.provenance import provenance
from mirror.export.products import name_products
from mirror.targets.cuda import PROVIDER
from mirror.targets.kernel_library import LIBRARY, operators_missing

BLOCK = 32
ARMS = ("own", "onnxruntime", "fpa_intb")
# Of a 14B model: q, k and v as one, attention's output, gate and up as one, down, and the LM head.
SIZES = "7168x5120,5120x5120,34816x5120,5120x17408,151936x5120"
_ENOUGH_BYTES = 300_000_000  # of matrices: more than a GPU's cache holds
_ORT = "com.microsoft"


def random_weights(outputs: int, inputs: int, bits: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """Return blocks, uint8 `[outputs, inputs / 32, 4 * bits]`, and scales, float16 `[outputs, inputs / 32]`."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (outputs, inputs // BLOCK, 4 * bits), dtype=np.uint8)
    scales = generator.uniform(0.001, 0.01, (outputs, inputs // BLOCK)).astype(np.float16)
    return blocks, scales


def product_model(
    weights: Sequence[tuple[NDArray[np.uint8], NDArray[np.float16]]], bits: int, *, gated: bool = False
) -> bytes:
    """Return a graph that multiplies x, float16 `[1, rows, inputs]`, with each matrix: y0, y1, ..

    Args:
        gated: whether each y is `silu(gate) * up` of a product's halves, by the function that bundles have for it.
    """
    nodes, tensors, outputs = [], [], []
    for index, (blocks, scales) in enumerate(weights):
        rows, count, _ = blocks.shape
        tensors += [
            helper.make_tensor(f"b{index}", TensorProto.UINT8, blocks.shape, blocks.tobytes(), raw=True),
            helper.make_tensor(f"s{index}", TensorProto.FLOAT16, scales.shape, scales.tobytes(), raw=True),
        ]
        facts = {"K": count * BLOCK, "N": rows, "bits": bits, "block_size": BLOCK, "accuracy_level": 4}
        names = ["x", f"b{index}", f"s{index}"]
        product = f"p{index}" if gated else f"y{index}"
        nodes.append(helper.make_node("MatMulNBits", names, [product], domain=_ORT, **facts))
        if gated:
            nodes += _gate(index)
        width = rows // 2 if gated else rows
        outputs.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT16, [1, "rows", width]))
    model = _model(nodes, tensors, outputs, weights[0][0].shape[1] * BLOCK)
    return _with_functions(model) if gated else model


def half_model(weights: Sequence[NDArray[np.float16]], *, gated: bool = False) -> bytes:
    """Return a graph that multiplies x with each matrix in float16, `[outputs, inputs]`: y0, y1, ..

    Args:
        gated: as in `product_model`. Products with small matrices are functions that bundles have for them, too.
    """
    nodes, tensors, values = [], [], []
    for index, matrix in enumerate(weights):
        outputs, _ = matrix.shape
        tensors.append(helper.make_tensor(f"w{index}", TensorProto.FLOAT16, matrix.shape, matrix.tobytes(), raw=True))
        product = f"p{index}" if gated else f"y{index}"
        nodes.append(helper.make_node("FusedMatMul", ["x", f"w{index}"], [product], domain=_ORT, transB=1, alpha=1.0))
        if gated:
            nodes += _gate(index)
        width = outputs // 2 if gated else outputs
        values.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT16, [1, "rows", width]))
    return _with_functions(_model(nodes, tensors, values, weights[0].shape[1]))


def _with_functions(model: bytes) -> bytes:
    named = ir.serde.deserialize_model(ModelProto.FromString(model))
    name_products(named)
    return bytes(ir.serde.serialize_model(named).SerializeToString())


def _gate(index: int) -> Iterator[NodeProto]:
    """Yield the nodes that make y of a product's halves."""
    yield helper.make_node("Split", [f"p{index}"], [f"gate{index}", f"up{index}"], axis=-1, num_outputs=2)
    yield helper.make_node("Sigmoid", [f"gate{index}"], [f"open{index}"])
    yield helper.make_node("Mul", [f"gate{index}", f"open{index}"], [f"silu{index}"])
    yield helper.make_node("Mul", [f"silu{index}", f"up{index}"], [f"y{index}"])


def _model(
    nodes: Sequence[NodeProto], tensors: Sequence[TensorProto], outputs: Sequence[ValueInfoProto], inputs: int
) -> bytes:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, [1, "rows", inputs])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_ORT, 1)]
    graph = helper.make_graph(nodes, "products", [x], outputs, tensors)
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def open_session(model: bytes, arm: str, *, recorded: bool = False) -> ort.InferenceSession:
    """Return a session on the first GPU.

    Args:
        arm: whose kernels, one of `ARMS`.
        recorded: whether its runs are replayed as a CUDA graph.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if arm == "own":
        options.register_custom_ops_library(str(LIBRARY))
    if arm == "fpa_intb":
        options.add_session_config_entry("ep.cuda.fpa_intb_gemm", "1")
    ort.preload_dlls()
    provider = {"enable_cuda_graph": "1"} if recorded else {}
    return ort.InferenceSession(model, options, providers=[(PROVIDER, provider)])


def time_us(session: ort.InferenceSession, rows: int, replays: int = 30) -> float:
    """Return the microseconds of one product, the fastest of five runs of replays."""
    inputs, names = session.get_inputs()[0].shape[2], [output.name for output in session.get_outputs()]
    x = np.random.default_rng(1).standard_normal((1, rows, inputs), np.float32).astype(np.float16)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0))
    for output in session.get_outputs():
        value = ort.OrtValue.ortvalue_from_shape_and_type((1, rows, output.shape[2]), np.float16, "cuda", 0)
        binding.bind_ortvalue_output(output.name, value)
    for _ in range(3):
        session.run_with_iobinding(binding)
    best = float("inf")
    for _ in range(5):
        start_s = time.perf_counter()
        for _ in range(replays):
            session.run_with_iobinding(binding)
        best = min(best, time.perf_counter() - start_s)
    return 1e6 * best / replays / len(names)


@click.command()
@click.option("--sizes", default=SIZES, show_default=True, help="Outputs x inputs, comma-separated.")
@click.option("--rows", "row_counts", default="1,8,16,64", show_default=True)
@click.option("--bits", "bit_counts", default="4,8,16", show_default=True)
@click.option("--arms", default=",".join(ARMS), show_default=True)
@click.option("--gated", is_flag=True, help="Each matrix's halves gate each other.")
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(sizes: str, row_counts: str, bit_counts: str, arms: str, gated: bool, out: Path | None) -> None:
    """Time products on the first GPU."""
    if "own" in arms and (missing := operators_missing()):
        raise click.ClickException(f"there are no kernels of mirror's own: {missing}")
    results = []
    for size in sizes.split(","):
        outputs, inputs = map(int, size.split("x"))
        for bits in map(int, bit_counts.split(",")):
            model = _model_of((outputs, inputs), bits, gated)
            for arm in arms.split(","):
                if arm == "fpa_intb" and bits != 4:
                    continue
                for rows in map(int, row_counts.split(",")):
                    # A recording is of one shape.
                    us = round(time_us(open_session(model, arm, recorded=True), rows), 1)
                    results.append({"size": size, "bits": bits, "gated": gated, "arm": arm, "rows": rows, "us": us})
                    click.echo(json.dumps(results[-1]))
    if out is not None:
        out.write_text(json.dumps({**provenance("mirror.bench.gpu_products"), "results": results}, indent=1) + "\n")


def _model_of(sizes: tuple[int, int], bits: int, gated: bool) -> bytes:
    """Return a graph with as many matrices as a GPU's cache doesn't hold."""
    outputs, inputs = sizes
    copies = -(-_ENOUGH_BYTES * 8 // (outputs * inputs * bits))
    if bits < 16:
        return product_model([random_weights(outputs, inputs, bits, seed=0)] * copies, bits, gated=gated)
    matrix = (0.02 * np.random.default_rng(0).standard_normal(sizes, np.float32)).astype(np.float16)
    return half_model([matrix] * copies, gated=gated)


if __name__ == "__main__":
    main()
