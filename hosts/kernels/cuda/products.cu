// Products of a few rows with a matrix of 4- or 8-bit integers or of float16 numbers, on NVIDIA GPUs from compute
// capability 8.0 on.
//
// Compiled when it is needed, by NVRTC, once for each choice of these numbers:
//   BITS         of a weight: 4, 8 or 16. Blocks of 32 integers along the input share a scale; zero is the middle.
//   TILES        of 16 outputs that a warp computes.
//   ROW_TILES    of 8 rows that a thread block computes.
//   STAGED       1 where rows lie in shared memory before they are multiplied. Else each warp reads them itself, which
//                is less work where few warps need the same.
//   ACROSS       warps beside each other over outputs,
//   ALONG        warps beside each other over the input.
//   AHEAD        steps whose weights are on their way.
//   MIN_BLOCKS   thread blocks that a multiprocessor has room for, by their registers.
//   PARTS        of the input, by thread blocks of their own.
//   OUTPUTS, BLOCKS  the matrix: its outputs, and blocks of its inputs.
//   GATED        1 where the outputs' first half is a gate of the second: y = silu(gate) * up then, by gated.cu.
//                ACROSS is 2.
//
// gated.cu lies before this text.
//
// y[row][output] = sum over blocks of scale * (q - zero) * x[row][input], in float32; a weight is rounded to float16
// once, as scale times integer, which is what ONNX Runtime's MatMulNBits multiplies with too. Every output's sum has
// one order, whatever the number of rows and the row's place: a position's result does not depend on its neighbours.
//
// A lane reads just what it multiplies. Within a step (four blocks, 128 inputs) lane t of a group of four has the t-th
// block of integers, or the t-th eight numbers of each block in float16; which inputs a lane's registers stand for is
// the same for weights and rows, and the matrix units add up all the same.

namespace {

constexpr int kBlock = 32;
constexpr int kBlockBytes = 4 * BITS;
constexpr int kChunks = BITS / 4;         // of 16 bytes in what a lane has of a step's weights
constexpr bool kWhole = BLOCKS % 4 == 0;  // whether all steps have four blocks
constexpr int kThreads = 32 * ACROSS * ALONG;
constexpr int kOutputs = 16 * TILES * ACROSS;  // of a thread block
// A thread block has its outputs from one place of the matrix, or each of its two halves from one.
constexpr int kSpans = GATED ? 2 : 1;
constexpr int kSpan = kOutputs / kSpans, kSpanOutputs = OUTPUTS / kSpans;
constexpr bool kEven = kSpanOutputs % kSpan == 0;
static_assert(!GATED || (ACROSS == 2 && OUTPUTS % 2 == 0), "a warp's outputs lie in one half");
constexpr int kRows = 8 * ROW_TILES;
constexpr int kSteps = (BLOCKS + 3) / 4;

// What a lane needs of a step, of eight outputs at a time.
struct Weights {
  uint4 values[TILES * 2][kChunks];
  u16 scales[TILES * 2];  // of integers
};

// The block that a lane's `part` of a step lies in, and the eight of its inputs there.
__device__ __forceinline__ int block_of(int step, int place, int part) {
  const int block = step * 4 + (BITS == 16 ? part : place);
  return kWhole || block < BLOCKS ? block : BLOCKS - 1;
}

__device__ __forceinline__ int eight_of(int step, int place, int part) {
  return block_of(step, place, part) * 4 + (BITS == 16 ? place : part);
}

__device__ __forceinline__ uint4 read_once(const void* source) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(source));
  return value;
}

// Calls `use(index, row, output)` for each of the thread block's results, `index` its place among them; of gated ones
// for the gate's alone, whose up lies kSpan further on there, and kSpanOutputs in the matrix.
template <typename Use>
__device__ __forceinline__ void for_results(int rows, Use use) {
  for (int place = threadIdx.x; place < kRows * kSpan; place += kThreads) {
    const int row = place / kSpan, output = blockIdx.x * kSpan + place % kSpan;
    if (row < rows && output < kSpanOutputs) use(row * kOutputs + place % kSpan, row, output);
  }
}

// Writes one result, of the sums that `sum(span)` gives.
template <typename Sum>
__device__ __forceinline__ void write(u16* y, int row, int output, Sum sum) {
#if GATED
  y[(long long)row * kSpanOutputs + output] = gated(half_of(sum(0)), half_of(sum(1)));
#else
  y[(long long)row * OUTPUTS + output] = half_of(sum(0));
#endif
}

}  // namespace

// weights: [OUTPUTS][BLOCKS][4 * BITS bytes], scales of integers: float16 [OUTPUTS][BLOCKS], x: float16 [rows][32 *
// BLOCKS], y: float16 [rows][OUTPUTS], half of that if GATED. The grid is (parts of the outputs, PARTS, groups of kRows
// rows). With more than one part of the input, partial is float32 [groups][PARTS][kRows][OUTPUTS], and tickets int32
// [groups][parts of the outputs], zero before and after.
extern "C" __global__ void __launch_bounds__(kThreads, MIN_BLOCKS)
    products(const unsigned char* __restrict__ weights, const u16* __restrict__ scales, const u16* __restrict__ x,
             u16* __restrict__ y, float* __restrict__ partial, int* __restrict__ tickets, int rows) {
  extern __shared__ uint4 shared[];  // rows, if STAGED: [steps][ROW_TILES][4][lane]
  x += (long long)blockIdx.z * kRows * BLOCKS * kBlock;
  y += (long long)blockIdx.z * kRows * (OUTPUTS / kSpans);
  partial += (long long)blockIdx.z * PARTS * kRows * OUTPUTS;
  tickets += blockIdx.z * gridDim.x;
  rows -= blockIdx.z * kRows;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = lane >> 2, place = lane & 3;
  const int across = warp % ACROSS, along = warp / ACROSS;
  // This thread block's steps, and of these every ALONG-th from the warp's own on.
  const int begin = kSteps * blockIdx.y / PARTS, end = kSteps * (blockIdx.y + 1) / PARTS;

  // An output past the last one (of its half) reads the last one's weights, and is not written.
  const int first =
      GATED ? across * kSpanOutputs + blockIdx.x * kSpan + group : blockIdx.x * kOutputs + across * TILES * 16 + group;
  const int behind = GATED ? (across + 1) * kSpanOutputs : OUTPUTS;
  const auto output_of = [&](int tile) { return kEven || first + tile * 8 < behind ? tile * 8 : behind - 1 - first; };
  const unsigned char* const values = weights + (long long)first * (BLOCKS * kBlockBytes);
  const u16* const scales_here = scales + (long long)first * BLOCKS;
  const auto fetch = [&](int step, Weights& into) {
    if (step >= end) return;
#pragma unroll
    for (int tile = 0; tile < TILES * 2; ++tile) {
      const unsigned char* const of_output = values + output_of(tile) * (BLOCKS * kBlockBytes);
#if BITS == 16
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
        into.values[tile][chunk] = kWhole || step * 4 + chunk < BLOCKS
                                       ? read_once(of_output + eight_of(step, place, chunk) * 16)
                                       : make_uint4(0, 0, 0, 0);
#else
      const int block = block_of(step, place, 0);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; ++chunk)
        into.values[tile][chunk] = read_once(of_output + block * kBlockBytes + chunk * 16);
      const bool there = kWhole || step * 4 + place < BLOCKS;
      into.scales[tile] = there ? __ldg(scales_here + output_of(tile) * BLOCKS + block) : 0;
#endif
    }
  };

  Weights ring[AHEAD];
#pragma unroll
  for (int stage = 0; stage < AHEAD; ++stage) fetch(begin + along + stage * ALONG, ring[stage]);

  // Eight inputs of a row in the order of the weights' registers. A row past the last one is the last one again, and is
  // not written.
  const auto eight_inputs = [&](int step, int row, int of_place, int part) {
    row = row < rows ? row : rows - 1;
    const uint4* const source = reinterpret_cast<const uint4*>(x + (long long)row * BLOCKS * kBlock);
    const uint4 eight = __ldg(source + eight_of(step, of_place, part));
#if BITS == 4
    return paired4(eight);
#else
    return eight;
#endif
  };
#if STAGED
  for (int index = threadIdx.x; index < (end - begin) * ROW_TILES * 128; index += kThreads) {
    const int of_lane = index & 31, part = index >> 5 & 3, tile = (index >> 7) % ROW_TILES;
    const int step = begin + (index >> 7) / ROW_TILES;
    shared[index] = eight_inputs(step, tile * 8 + (of_lane >> 2), of_lane & 3, part);
  }
  __syncthreads();
#endif

  float sums[TILES][ROW_TILES][4] = {};
  const auto multiply_step = [&](int step, const Weights& given) {
#if STAGED
    const uint4* source = shared + (step - begin) * ROW_TILES * 128 + lane;
#endif
#if BITS != 16
    u32 scale[TILES * 2];
#pragma unroll
    for (int tile = 0; tile < TILES * 2; ++tile) scale[tile] = given.scales[tile] * 0x10001u;
#endif
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // eight of the lane's inputs
      uint4 right[ROW_TILES];
#pragma unroll
      for (int tile = 0; tile < ROW_TILES; ++tile)
#if STAGED
        right[tile] = source[(tile * 4 + part) * 32];
#else
        right[tile] = eight_inputs(step, tile * 8 + group, place, part);
#endif
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        u32 upper[4], lower[4];
#if BITS == 4
        unpack4(word_of(given.values[tile * 2][0], part), scale[tile * 2], upper);
        unpack4(word_of(given.values[tile * 2 + 1][0], part), scale[tile * 2 + 1], lower);
#elif BITS == 16
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          upper[word] = word_of(given.values[tile * 2][part], word);
          lower[word] = word_of(given.values[tile * 2 + 1][part], word);
        }
#else
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const int index = (part & 1) * 2 + word;
          unpack8(word_of(given.values[tile * 2][part / 2], index), scale[tile * 2], upper + word * 2);
          unpack8(word_of(given.values[tile * 2 + 1][part / 2], index), scale[tile * 2 + 1], lower + word * 2);
        }
#endif
#pragma unroll
        for (int of_rows = 0; of_rows < ROW_TILES; ++of_rows) {
          multiply(sums[tile][of_rows], upper[0], lower[0], upper[1], lower[1], right[of_rows].x, right[of_rows].y);
          multiply(sums[tile][of_rows], upper[2], lower[2], upper[3], lower[3], right[of_rows].z, right[of_rows].w);
        }
      }
    }
  };
  for (int base = begin + along; base < end; base += ALONG * AHEAD) {
#pragma unroll
    for (int stage = 0; stage < AHEAD; ++stage) {
      const int step = base + stage * ALONG;
      if (step < end) {
        multiply_step(step, ring[stage]);
        fetch(step + ALONG * AHEAD, ring[stage]);
      }
    }
  }
#if STAGED
  __syncthreads();
#endif

  // The warps along the input, added up in their order.
  float* const added = reinterpret_cast<float*>(shared);  // [ALONG][kRows][kOutputs]
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
    for (int of_rows = 0; of_rows < ROW_TILES; ++of_rows)
#pragma unroll
      for (int index = 0; index < 4; ++index) {
        const int row = of_rows * 8 + place * 2 + (index & 1);
        const int output = (across * TILES + tile) * 16 + group + (index & 2) * 4;
        added[(along * kRows + row) * kOutputs + output] = sums[tile][of_rows][index];
      }
  __syncthreads();
  for_results(rows, [&](int index, int row, int output) {
    const auto sum_of = [&](int span) {
      float sum = 0;
#pragma unroll
      for (int of_warp = 0; of_warp < ALONG; ++of_warp) sum += added[of_warp * kRows * kOutputs + index + span * kSpan];
      return sum;
    };
    if (PARTS == 1) {
      write(y, row, output, sum_of);
    } else {
#pragma unroll
      for (int span = 0; span < kSpans; ++span)
        partial[((long long)blockIdx.y * kRows + row) * OUTPUTS + output + span * kSpanOutputs] = sum_of(span);
    }
  });
  if (PARTS == 1) return;

  // Who comes last adds up the parts of the input, in their order.
  __shared__ int last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&tickets[blockIdx.x], 1) == PARTS - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  for_results(rows, [&](int, int row, int output) {
    write(y, row, output, [&](int span) {
      float sum = 0;
#pragma unroll
      for (int part = 0; part < PARTS; ++part)
        sum += __ldcg(&partial[((long long)part * kRows + row) * OUTPUTS + output + span * kSpanOutputs]);
      return sum;
    });
  });
  if (threadIdx.x == 0) tickets[blockIdx.x] = 0;
}
