// What a draft's pass makes of its small inputs, on NVIDIA GPUs.

namespace {

constexpr u16 kHidden = 0xfb53;  // -60000 in float16, as masks have it

}  // namespace

// slot_branch: int32 [slots or more], row_visible, row_branch: int32 [rows], y: float16 [rows][slots]: 0 where a row
// sees a slot, below its own number of them or of its own branch. The grid is (parts of the slots, rows).
extern "C" __global__ void branch_mask(const int* __restrict__ slot_branch, const int* __restrict__ row_visible,
                                       const int* __restrict__ row_branch, u16* __restrict__ y, int slots) {
  const int slot = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (slot >= slots) return;
  const bool seen = slot < row_visible[row] || slot_branch[slot] == row_branch[row];
  y[(long long)row * slots + slot] = seen ? 0 : kHidden;
}

// ids: int64 [rows], embedding: float16 [rows][width], streams: float16 [streams][width], y: float16 [rows][width]: a
// stream's vector for ids past the vocabulary. The grid is (parts of the width, rows).
extern "C" __global__ void stream_embedding(const long long* __restrict__ ids, const u16* __restrict__ embedding,
                                            const u16* __restrict__ streams, u16* __restrict__ y, int width,
                                            int vocabulary) {
  const int channel = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (channel >= width) return;
  const long long past = ids[row] - vocabulary;
  y[(long long)row * width + channel] =
      past >= 0 ? streams[past * width + channel] : embedding[(long long)row * width + channel];
}
