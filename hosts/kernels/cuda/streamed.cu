// Products of a few rows with a large matrix of 4- or 8-bit integers, on NVIDIA GPUs from compute capability 8.0 on,
// as fast as the matrix is read. gated.cu lies before this text.
//
// Compiled when it is needed, by NVRTC, once for each choice of these numbers:
//   BITS         of a weight, 4 or 8. Blocks of 32 integers along the input share a scale; zero is the middle.
//   ROW_TILES    of 8 rows that a thread block computes.
//   WARPS        of a thread block.
//   AHEAD        steps for which a warp has room, all but one of them on their way.
//   PARTS        of the input, by thread blocks of their own.
//   OUTPUTS, BLOCKS  the matrix: its outputs, and blocks of its inputs, a multiple of kStepBlocks.
//   GATED        1 where the outputs' first half is a gate of the second: y = silu(gate) * up then.
//
// Each multiprocessor has one thread block, which keeps its part of all rows in shared memory and reads a stretch of
// the matrix: tiles of 16 outputs (8 of each half, if gated), each in steps of 8 blocks. A warp has a stretch of that
// for itself, and waits for no other until it has come to its end. So the matrix flows from first to last.
//
// y[row][output] = sum over blocks of scale * (q - zero) * x[row][input], in float32; a weight is rounded to float16
// once, as scale times integer, which is what ONNX Runtime's MatMulNBits multiplies with too. Every output's sum has
// one order, whatever the number of rows and the row's place: a position's result does not depend on its neighbours.
//
// What a lane reads of the matrix it multiplies itself. Which inputs its registers stand for is the same for weights
// and rows, and the matrix units add up all the same. Of a step, lane t of a group of four has every fourth 16 bytes of
// its two outputs from the t-th on (a piece), so that a warp's reads are whole sectors of memory.

namespace {

constexpr int kBlock = 32;
constexpr int kBlockBytes = 4 * BITS;
constexpr int kStepBlocks = 8;
constexpr int kSteps = BLOCKS / kStepBlocks;
static_assert(BLOCKS % kStepBlocks == 0, "whole steps");
constexpr int kHalf = OUTPUTS / 2;
constexpr int kTiles = GATED ? (kHalf + 7) / 8 : (OUTPUTS + 15) / 16;
constexpr int kChunks = BITS / 4;                   // of 16 bytes in a block
constexpr int kPieces = kStepBlocks * kChunks / 4;  // of an output, that a lane has of a step
constexpr int kEights = 4 / kChunks;                // of inputs in a piece
constexpr int kValueBytes = 16 * kStepBlocks * kBlockBytes, kScaleBytes = 16 * kStepBlocks * 2;  // of a step
constexpr int kStageBytes = kValueBytes + kScaleBytes;
constexpr int kThreads = 32 * WARPS;
constexpr int kRows = 8 * ROW_TILES;

__device__ __forceinline__ void copy16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// Of eights of a row's inputs in shared memory, the place of one whose piece lane `lane` multiplies: `eight` of its
// step. Neither warps that write a row's eights in their order nor warps that read one of each lane meet at a bank.
__device__ __forceinline__ int place_of(int step, int row_tile, int eight, int lane) {
  const int turned = lane ^ (eight % kEights * (8 / kEights));
  return ((step * ROW_TILES + row_tile) * kStepBlocks + eight) * 32 + turned;
}

// What a lane has of a tile's results for 8 rows: x and y of output lane / 4 and rows lane % 4 * 2 and the next one, z
// and w of the output 8 further on, or of the other half.
__device__ __forceinline__ void add(float4& to, const float4& what) {
  to.x += what.x;
  to.y += what.y;
  to.z += what.z;
  to.w += what.w;
}

__device__ __forceinline__ void write(u16* y, int rows, int tile, const float4 (&sums)[ROW_TILES], int lane) {
#pragma unroll
  for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int row = row_tile * 8 + (lane & 3) * 2 + odd;
      if (row >= rows) continue;
      const u16 upper = half_of(odd ? sums[row_tile].y : sums[row_tile].x);
      const u16 lower = half_of(odd ? sums[row_tile].w : sums[row_tile].z);
#if GATED
      const int output = tile * 8 + (lane >> 2);
      if (output < kHalf) y[(long long)row * kHalf + output] = gated(upper, lower);
#else
      const int output = tile * 16 + (lane >> 2);
      if (output < OUTPUTS) y[(long long)row * OUTPUTS + output] = upper;
      if (output + 8 < OUTPUTS) y[(long long)row * OUTPUTS + output + 8] = lower;
#endif
    }
}

}  // namespace

// weights: [OUTPUTS][BLOCKS][4 * BITS bytes], scales: float16 [OUTPUTS][BLOCKS], x: float16 [rows][32 * BLOCKS], y:
// float16 [rows][OUTPUTS], half of that if GATED. The grid is (parts of the tiles, PARTS, groups of kRows rows). With
// more than one part of the input, partial is float32 [groups][tiles][PARTS][ROW_TILES][32 lanes][4], and tickets int32
// [groups][tiles], zero before and after. Shared memory: WARPS * AHEAD stages, and kRows rows of the longest part.
extern "C" __global__ void __launch_bounds__(kThreads, 512 / kThreads)
    streamed(const unsigned char* __restrict__ weights, const u16* __restrict__ scales, const u16* __restrict__ x,
             u16* __restrict__ y, float4* __restrict__ partial, int* __restrict__ tickets, int rows) {
  extern __shared__ uint4 shared[];
  __shared__ float4 begun[WARPS][ROW_TILES][32];  // what warps have of tiles that an earlier one began
  x += (long long)blockIdx.z * kRows * BLOCKS * kBlock;
  y += (long long)blockIdx.z * kRows * (GATED ? kHalf : OUTPUTS);
  partial += (long long)blockIdx.z * kTiles * PARTS * ROW_TILES * 32;
  tickets += blockIdx.z * kTiles;
  rows -= blockIdx.z * kRows;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = lane >> 2, place = lane & 3;

  // This thread block's steps of the input and tiles, and the warp's stretch of these, in steps.
  const int first_step = kSteps * blockIdx.y / PARTS;
  const int steps = kSteps % PARTS == 0 ? kSteps / PARTS : kSteps * (blockIdx.y + 1) / PARTS - first_step;
  const auto tiles_before = [&](int block) { return (int)((long long)kTiles * block / gridDim.x); };
  const int first_tile = tiles_before(blockIdx.x);
  const int all_steps = (tiles_before(blockIdx.x + 1) - first_tile) * steps;
  const auto begin_of = [&](int of_warp) { return (int)((long long)all_steps * of_warp / WARPS); };
  const int begin = begin_of(warp), end = begin_of(warp + 1);

  unsigned char* const ring = reinterpret_cast<unsigned char*>(shared) + warp * AHEAD * kStageBytes;
  uint4* const given = shared + WARPS * AHEAD * kStageBytes / 16;
  const u32 ring_at = (u32)__cvta_generic_to_shared(ring) + lane * 16;

  // What is fetched next. An output past the last one (of its half) reads the last one's weights, and is not written.
  int left = end - begin, next_tile = first_tile + begin / steps, next_step = begin % steps, next_stage = 0;
  const unsigned char *upper = nullptr, *lower = nullptr, *scales_of_lane = nullptr;
  const auto aim = [&] {
    const auto output_of = [&](int of_tile) {
      return GATED ? min(next_tile * 8 + of_tile % 8, kHalf - 1) + of_tile / 8 * kHalf
                   : min(next_tile * 16 + of_tile, OUTPUTS - 1);
    };
    const int block = (first_step + next_step) * kStepBlocks;
    upper = weights + ((long long)output_of(group) * BLOCKS + block) * kBlockBytes + place * 16;
    lower = weights + ((long long)output_of(group + 8) * BLOCKS + block) * kBlockBytes + place * 16;
    scales_of_lane = reinterpret_cast<const unsigned char*>(scales + (long long)output_of(lane % 16) * BLOCKS + block);
  };
  aim();
  const auto fetch = [&] {
    if (left > 0) {
      const u32 to = ring_at + next_stage * kStageBytes;
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        copy16(to + piece * 1024, upper + piece * 64);
        copy16(to + piece * 1024 + 512, lower + piece * 64);
      }
      if (lane < 16) copy16(to + kValueBytes, scales_of_lane);
      --left;
      if (++next_step == steps) {
        next_step = 0;
        ++next_tile;
        aim();
      } else {
        upper += kStepBlocks * kBlockBytes;
        lower += kStepBlocks * kBlockBytes;
        scales_of_lane += kStepBlocks * 2;
      }
    }
    next_stage = next_stage + 1 == AHEAD ? 0 : next_stage + 1;
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
#pragma unroll
  for (int stage = 0; stage < AHEAD - 1; ++stage) fetch();

  // The rows, in the order of the weights' registers; a row past the last one is the last one again, and is not
  // written. A warp reads what a step has of a row at once.
  {
    const int piece = lane / kEights, eight = piece / 4 * kEights + lane % kEights;
#pragma unroll 8
    for (int index = warp; index < steps * kRows; index += WARPS) {
      const int step = index / kRows, row = index % kRows;
      const uint4* const source = reinterpret_cast<const uint4*>(x + (long long)min(row, rows - 1) * BLOCKS * kBlock);
      const uint4 read = __ldg(source + (first_step + step) * 32 + lane);
      given[place_of(step, row / 8, eight, row % 8 * 4 + piece % 4)] = BITS == 4 ? paired4(read) : read;
    }
  }
  __syncthreads();

  // Writes a tile's results, or this part's; who comes last adds up the parts, in their order, and writes.
  const auto emit = [&](int tile, float4(&sums)[ROW_TILES]) {
    if (PARTS == 1) return write(y, rows, tile, sums, lane);
    float4* const parts = partial + (long long)tile * PARTS * ROW_TILES * 32 + lane;
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
      __stcg(&parts[(blockIdx.y * ROW_TILES + row_tile) * 32], sums[row_tile]);
    __threadfence();
    __syncwarp();
    int before = 0;
    if (lane == 0) before = atomicAdd(&tickets[tile], 1);
    if (__shfl_sync(0xffffffffu, before, 0) != PARTS - 1) return;
    __threadfence();
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
      for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
        const float4 of_part = __ldcg(&parts[(part * ROW_TILES + row_tile) * 32]);
        if (part == 0)
          sums[row_tile] = of_part;
        else
          add(sums[row_tile], of_part);
      }
    write(y, rows, tile, sums, lane);
    if (lane == 0) tickets[tile] = 0;
  };

  float4 result[ROW_TILES];
  float sums[ROW_TILES][2][4] = {};  // two at a time: the matrix units take a while
  int tile = first_tile + begin / steps, step = begin % steps, stage = 0;
  bool is_ours = step == 0;  // whether this warp began the tile
  for (int todo = end - begin; todo > 0; --todo) {
    asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 2) : "memory");
    __syncwarp();  // for scales, which other lanes fetched
    const unsigned char* const at = ring + stage * kStageBytes;
    const u16* const scale = reinterpret_cast<const u16*>(at + kValueBytes);
    uint4 above[kPieces], below[kPieces];
    u32 scale_above[kPieces], scale_below[kPieces];
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      above[piece] = *reinterpret_cast<const uint4*>(at + piece * 1024 + lane * 16);
      below[piece] = *reinterpret_cast<const uint4*>(at + piece * 1024 + 512 + lane * 16);
      const int block = (place + 4 * piece) / kChunks;
      scale_above[piece] = scale[group * kStepBlocks + block] * 0x10001u;
      scale_below[piece] = scale[(group + 8) * kStepBlocks + block] * 0x10001u;
    }
    __syncwarp();
    fetch();
    stage = stage + 1 == AHEAD ? 0 : stage + 1;
#pragma unroll
    for (int eight = 0; eight < kStepBlocks; ++eight) {
      const int piece = eight / kEights, of_piece = eight % kEights;
      uint4 right[ROW_TILES];
#pragma unroll
      for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile)
        right[row_tile] = given[place_of(step, row_tile, eight, lane)];
      u32 left_above[4], left_below[4];
#if BITS == 4
      unpack4(word_of(above[piece], of_piece), scale_above[piece], left_above);
      unpack4(word_of(below[piece], of_piece), scale_below[piece], left_below);
#else
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        unpack8(word_of(above[piece], of_piece * 2 + word), scale_above[piece], left_above + word * 2);
        unpack8(word_of(below[piece], of_piece * 2 + word), scale_below[piece], left_below + word * 2);
      }
#endif
#pragma unroll
      for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
        float (&into)[4] = sums[row_tile][eight % 2];
        multiply(into, left_above[0], left_below[0], left_above[1], left_below[1], right[row_tile].x,
                 right[row_tile].y);
        multiply(into, left_above[2], left_below[2], left_above[3], left_below[3], right[row_tile].z,
                 right[row_tile].w);
      }
    }
    const bool is_whole = ++step == steps;
    if (!is_whole && todo > 1) continue;
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) {
      float (&both)[2][4] = sums[row_tile];
      result[row_tile] = make_float4(both[0][0] + both[1][0], both[0][1] + both[1][1], both[0][2] + both[1][2],
                                     both[0][3] + both[1][3]);
#pragma unroll
      for (int index = 0; index < 8; ++index) both[index / 4][index % 4] = 0;
      if (!is_ours) begun[warp][row_tile][lane] = result[row_tile];
    }
    if (!is_whole) break;
    if (is_ours) emit(tile, result);
    is_ours = true;
    step = 0;
    ++tile;
  }
  __syncthreads();

  // A tile that more than one warp had is added up by the one that began it, in the order of the inputs.
  if (!is_ours || step == 0) return;
  const int behind = (tile - first_tile + 1) * steps;
  for (int other = warp + 1; other < WARPS && begin_of(other) < behind; ++other) {
    if (begin_of(other) == begin_of(other + 1)) continue;
#pragma unroll
    for (int row_tile = 0; row_tile < ROW_TILES; ++row_tile) add(result[row_tile], begun[other][row_tile][lane]);
  }
  emit(tile, result);
}
