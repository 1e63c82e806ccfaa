// silu(gate) * up, gate and up the halves of each row of one product, on NVIDIA GPUs: as a kernel of its own, for
// products that others have computed, and for ours, which lie behind this text and do it themselves (products.cu,
// streamed.cu).
// Rounded where ONNX Runtime's operators would: gate and up, silu and its product are float16, all between is float32.

namespace {

__device__ __forceinline__ u16 gated(u16 gate, u16 up) {
  const float open = widened(gate);
  const u16 silu = half_of(open / (1.0f + expf(-open)));
  return half_of(widened(silu) * widened(up));
}

}  // namespace

// both: float16 [rows][2][inner], y: float16 [rows][inner]. The grid is (parts of the inner channels, rows).
extern "C" __global__ void gate_rows(const u16* __restrict__ both, u16* __restrict__ y, int inner) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x;
  if (channel >= inner) return;
  const u16* const row = both + 2ll * blockIdx.y * inner;
  y[(long long)blockIdx.y * inner + channel] = gated(row[channel], row[inner + channel]);
}
