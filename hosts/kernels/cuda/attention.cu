// Attention of a few rows over a cache in place, on NVIDIA GPUs from compute capability 8.0 on: ONNX Runtime's
// GroupQueryAttention in one kernel, the turning of queries and keys and the writing of the cache included.
//
// Compiled when it is needed, by NVRTC, once for each choice of these numbers:
//   HEAD    channels of a head, a multiple of 64.
//   GROUP   query heads of a key head.
//   ROTARY  whether queries and keys are turned by their positions, the first half of a head against the second.
//   BIAS    whether numbers are added to the scores, of each row and slot.
//
// A thread block has 16 queries of one key head (rows times heads of the group) and every gridDim.y-th tile of 64
// slots; who comes last adds up the parts, in their order. Which tiles a part has, and in what order, depends on the
// grid alone and not on how much is filled or where a row stands, so a position's result is the same in any row of a
// pass of the same width, and beside any others.
//
// The matrix units add up over channels in any order that queries and keys share: lane t of four has the channels 8t to
// 8t + 7 of each 32, sixteen bytes at a time. Its partner channels half a head away are then its own too.

namespace {

constexpr int kThreads = 128;
constexpr int kSlots = 64;          // of a tile
constexpr int kQueries = 16;        // of a thread block
constexpr int kBlocks = HEAD / 32;  // of 32 channels
constexpr int kHalf = kBlocks / 2;
constexpr int kColumns = HEAD / 32;     // tiles of 8 channels of a warp's quarter of a head
constexpr int kValueStride = HEAD + 8;  // of a slot's values in shared memory
constexpr int kMostParts = 64;
constexpr int kChanceStride = kSlots + 8;
constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ uint4 load(const u16* source) { return *reinterpret_cast<const uint4*>(source); }
__device__ __forceinline__ void store(u16* target, uint4 value) { *reinterpret_cast<uint4*>(target) = value; }

__device__ __forceinline__ u32 halves_of(float low, float high) {
  u32 both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float exp2_of(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}

__device__ __forceinline__ float lowest() { return __int_as_float(0xff800000); }

// Two channels of each of two halves, turned. The same bits wherever it is inlined.
__device__ __forceinline__ void turn(u32& first, u32& second, u32 cosine, u32 sine) {
  float turned[2][2];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int shift = 16 * part;
    const float a = widened(u16(first >> shift)), b = widened(u16(second >> shift));
    const float c = widened(u16(cosine >> shift)), s = widened(u16(sine >> shift));
    turned[0][part] = __fmaf_rn(a, c, -__fmul_rn(b, s));
    turned[1][part] = __fmaf_rn(b, c, __fmul_rn(a, s));
  }
  first = halves_of(turned[0][0], turned[0][1]);
  second = halves_of(turned[1][0], turned[1][1]);
}

__device__ __forceinline__ void turn(uint4& first, uint4& second, const uint4& cosine, const uint4& sine) {
  turn(first.x, second.x, cosine.x, sine.x);
  turn(first.y, second.y, cosine.y, sine.y);
  turn(first.z, second.z, cosine.z, sine.z);
  turn(first.w, second.w, cosine.w, sine.w);
}

__device__ __forceinline__ u32 shared_address(const void* place) { return u32(__cvta_generic_to_shared(place)); }

}  // namespace

// q: float16 [rows][q_stride], of which GROUP * gridDim.x heads; k and v: [rows][kv_stride], gridDim.x heads; key_cache
// and value_cache: [gridDim.x][capacity][HEAD]; cosines and sines: [positions][HEAD / 2]; positions: int64 [rows], null
// for those of the slots; bias: float16 [rows][bias_stride]; filled: the slots that hold something after this pass,
// less one; y: float16 [rows][GROUP * gridDim.x * HEAD]. The grid is (key heads, parts, tiles of queries). With more
// than one part, partial is float32 [tiles][key heads][parts][16][HEAD + 2], and tickets int32 [tiles][key heads], zero
// before and after.
extern "C" __global__ void __launch_bounds__(kThreads)
    attention(const u16* q, const u16* k, const u16* v, int q_stride, int kv_stride, u16* key_cache, u16* value_cache,
              const u16* cosines, const u16* sines, const long long* positions, const u16* bias, int bias_stride,
              const int* filled, u16* y, float* partial, int* tickets, float scale, int rows, int capacity) {
  extern __shared__ uint4 dynamic[];
  u16* const values = reinterpret_cast<u16*>(dynamic);  // [2][kSlots][kValueStride]
  __shared__ __align__(16) u16 chances[kQueries * kChanceStride];
  __shared__ float highest[4][kQueries], sums_of[4][kQueries];
  __shared__ int last;

  const int key_heads = gridDim.x, parts = gridDim.y;
  const int head = blockIdx.x, part = blockIdx.y;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int group = lane >> 2, place = lane & 3;
  const int length = *filled + 1, past = length - rows;
  const auto position_of = [&](int row) { return positions != nullptr ? positions[row] : (long long)(past + row); };

  const int first_query = blockIdx.z * kQueries;
  const int last_row = min(rows - 1, (first_query + kQueries - 1) / GROUP);
  const int tiles = (past + last_row + kSlots) / kSlots;  // that a row of these sees
  const int active = min(parts, tiles);

  // The cache's new slots, which nobody reads there in this pass. Thread blocks without a part come first.
  const auto append = [&] {
    const int block = ((parts - 1 - part) * gridDim.z + blockIdx.z) * key_heads + head;
    const int keys = rows * key_heads * (HEAD / 16), all = keys + rows * key_heads * (HEAD / 8);
    for (int item = block * kThreads + threadIdx.x; item < all; item += key_heads * parts * gridDim.z * kThreads) {
      const bool is_key = item < keys;
      const int pieces = is_key ? HEAD / 16 : HEAD / 8;
      const int index = is_key ? item : item - keys;
      const int piece = index % pieces, of_head = index / pieces % key_heads, row = index / pieces / key_heads;
      const long long slot = ((long long)of_head * capacity + past + row) * HEAD + piece * 8;
      const long long source = (long long)row * kv_stride + of_head * HEAD + piece * 8;
      if (is_key) {
        uint4 first = load(k + source), second = load(k + source + HEAD / 2);
        if (ROTARY) {
          const long long turned = position_of(row) * (HEAD / 2) + piece * 8;
          turn(first, second, load(cosines + turned), load(sines + turned));
        }
        store(key_cache + slot, first);
        store(key_cache + slot + HEAD / 2, second);
      } else {
        store(value_cache + slot, load(v + source));
      }
    }
  };
  if (part >= active) {
    append();
    return;
  }

  const u16* const old_keys = key_cache + (long long)head * capacity * HEAD;
  const u16* const old_values = value_cache + (long long)head * capacity * HEAD;
  uint4 keys[2][kBlocks];
  const auto fetch_keys = [&](int tile) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int slot = tile * kSlots + warp * 16 + n * 8 + group;
      if (slot < past) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
          keys[n][block] = load(old_keys + (long long)slot * HEAD + block * 32 + place * 8);
      } else if (slot < length) {
        const int row = slot - past;
        const u16* const source = k + (long long)row * kv_stride + head * HEAD + place * 8;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) keys[n][block] = load(source + block * 32);
        if (ROTARY) {
          const long long turned = position_of(row) * (HEAD / 2) + place * 8;
#pragma unroll
          for (int block = 0; block < kHalf; ++block)
            turn(keys[n][block], keys[n][block + kHalf], load(cosines + turned + block * 32),
                 load(sines + turned + block * 32));
        }
      } else {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) keys[n][block] = make_uint4(0, 0, 0, 0);
      }
    }
  };
  const auto fetch_values = [&](int tile, int buffer) {
    u16* const into = values + buffer * kSlots * kValueStride;
    for (int item = threadIdx.x; item < kSlots * (HEAD / 8); item += kThreads) {
      const int of_tile = item / (HEAD / 8), piece = item % (HEAD / 8);
      const int slot = tile * kSlots + of_tile;
      u16* const target = into + of_tile * kValueStride + piece * 8;
      if (slot < past)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)),
                     "l"(old_values + (long long)slot * HEAD + piece * 8));
      else
        store(target, slot < length ? load(v + (long long)(slot - past) * kv_stride + head * HEAD + piece * 8)
                                    : make_uint4(0, 0, 0, 0));
    }
  };
  const auto commit = [] { asm volatile("cp.async.commit_group;"); };

  float best[2] = {lowest(), lowest()}, total[2] = {0, 0};
  float mixed[kColumns][4] = {};
  fetch_keys(part);
  fetch_values(part, 0);
  commit();

  const int query[2] = {first_query + group, first_query + group + 8};
  const int row_of[2] = {query[0] / GROUP, query[1] / GROUP};
  uint4 queries[2][kBlocks];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int row = row_of[which];
    if (row < rows) {
      const u16* const source =
          q + (long long)row * q_stride + (head * GROUP + query[which] % GROUP) * HEAD + place * 8;
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) queries[which][block] = load(source + block * 32);
      if (ROTARY) {
        const long long turned = position_of(row) * (HEAD / 2) + place * 8;
#pragma unroll
        for (int block = 0; block < kHalf; ++block)
          turn(queries[which][block], queries[which][block + kHalf], load(cosines + turned + block * 32),
               load(sines + turned + block * 32));
      }
    } else {
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) queries[which][block] = make_uint4(0, 0, 0, 0);
    }
  }
  append();

  int buffer = 0;
  for (int tile = part; tile < tiles; tile += parts, buffer ^= 1) {
    float scores[2][4] = {};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const uint4 a = queries[0][block], b = queries[1][block], key = keys[n][block];
        multiply(scores[n], a.x, b.x, a.y, b.y, key.x, key.y);
        multiply(scores[n], a.z, b.z, a.w, b.w, key.z, key.w);
      }
    const bool more = tile + parts < tiles;
    if (more) fetch_keys(tile + parts);

    float most[2] = {lowest(), lowest()};
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int index = 0; index < 4; ++index) {
        const int which = index >> 1, row = row_of[which];
        const int slot = tile * kSlots + warp * 16 + n * 8 + place * 2 + (index & 1);
        float score = scores[n][index] * scale;
        const bool seen = row < rows && slot <= past + row;
        if (BIAS && seen) score += widened(bias[(long long)row * bias_stride + slot]);
        scores[n][index] = seen ? score * kLog2e : lowest();
        most[which] = fmaxf(most[which], scores[n][index]);
      }
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      most[which] = fmaxf(most[which], __shfl_xor_sync(~0u, most[which], 1));
      most[which] = fmaxf(most[which], __shfl_xor_sync(~0u, most[which], 2));
      if (place == 0) highest[warp][group + 8 * which] = most[which];
    }
    __syncthreads();
    // Everybody is past the last tile's values now, which the next ones may replace.
    if (more) fetch_values(tile + parts, buffer ^ 1);
    commit();

    float shrink[2];
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float now = best[which];
#pragma unroll
      for (int of_warp = 0; of_warp < 4; ++of_warp) now = fmaxf(now, highest[of_warp][group + 8 * which]);
      const float from = now == lowest() ? 0.0f : now;  // where nothing is seen yet
      shrink[which] = exp2_of(best[which] - from);
      best[which] = now;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float low = exp2_of(scores[n][2 * which] - from), high = exp2_of(scores[n][2 * which + 1] - from);
        sum += low + high;
        *reinterpret_cast<u32*>(chances + (group + 8 * which) * kChanceStride + warp * 16 + n * 8 + place * 2) =
            halves_of(low, high);
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (place == 0) sums_of[warp][group + 8 * which] = sum;
    }
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();

#pragma unroll
    for (int which = 0; which < 2; ++which) {
      float sum = 0;
#pragma unroll
      for (int of_warp = 0; of_warp < 4; ++of_warp) sum += sums_of[of_warp][group + 8 * which];
      total[which] = __fmaf_rn(total[which], shrink[which], sum);
    }
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
#pragma unroll
      for (int index = 0; index < 4; ++index) mixed[n][index] *= shrink[index >> 1];
    const u16* const here = values + buffer * kSlots * kValueStride;
#pragma unroll
    for (int step = 0; step < kSlots / 16; ++step) {
      u32 a[4];
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                   : "r"(shared_address(chances + (lane & 15) * kChanceStride + step * 16 + (lane >> 4) * 8)));
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        u32 b[2];
        asm volatile(
            "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
            : "=r"(b[0]), "=r"(b[1])
            : "r"(shared_address(here + (step * 16 + (lane & 15)) * kValueStride + warp * (HEAD / 4) + n * 8)));
        multiply(mixed[n], a[0], a[1], a[2], a[3], b[0], b[1]);
      }
    }
  }

  const int width = GROUP * key_heads * HEAD;
  const auto result_of = [&](int index) {  // of a query: its row's and head's channels
    return y + (long long)(index / GROUP) * width + (head * GROUP + index % GROUP) * HEAD;
  };
  const int channel = warp * (HEAD / 4) + place * 2;
  if (active == 1) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      if (row_of[which] >= rows) continue;
      const float share = total[which] > 0 ? 1.0f / total[which] : 0.0f;
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
        *reinterpret_cast<u32*>(result_of(query[which]) + channel + n * 8) =
            halves_of(mixed[n][2 * which] * share, mixed[n][2 * which + 1] * share);
    }
    return;
  }

  // Parts: what is mixed, then the highest scores, then the totals.
  const int group_of_parts = blockIdx.z * key_heads + head;
  constexpr int kPart = kQueries * (HEAD + 2);
  float* const all_parts = partial + (long long)group_of_parts * parts * kPart;
  float* const mine = all_parts + part * kPart;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const int of_block = group + 8 * which;
#pragma unroll
    for (int n = 0; n < kColumns; ++n)
      *reinterpret_cast<float2*>(mine + of_block * HEAD + channel + n * 8) =
          make_float2(mixed[n][2 * which], mixed[n][2 * which + 1]);
    if (warp == 0 && place == 0) {
      mine[kQueries * HEAD + of_block] = best[which];
      mine[kQueries * (HEAD + 1) + of_block] = total[which];
    }
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(&tickets[group_of_parts], 1) == active - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  // What each part weighs; eight threads for each query, in an order that more parts of nothing do not change.
  float* const weights = reinterpret_cast<float*>(dynamic);  // [parts][16]
  float* const shares = weights + kMostParts * kQueries;
  {
    const int of_block = threadIdx.x / 8, from_part = threadIdx.x % 8;
    float highest_of[kMostParts / 8], totals_of[kMostParts / 8];
    float most = lowest();
#pragma unroll
    for (int index = 0; index < kMostParts / 8; ++index) {
      const int of_part = index * 8 + from_part;
      const float* const one = all_parts + of_part * kPart + kQueries * HEAD + of_block;
      highest_of[index] = of_part < active ? __ldcg(one) : lowest();
      totals_of[index] = of_part < active ? __ldcg(one + kQueries) : 0.0f;
    }
#pragma unroll
    for (int index = 0; index < kMostParts / 8; ++index) most = fmaxf(most, highest_of[index]);
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, apart));
    const float from = most == lowest() ? 0.0f : most;
    float sum = 0;
#pragma unroll
    for (int index = 0; index < kMostParts / 8; ++index) {
      const float weight = exp2_of(highest_of[index] - from);
      sum = __fmaf_rn(weight, totals_of[index], sum);
      weights[(index * 8 + from_part) * kQueries + of_block] = weight;
    }
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2) sum += __shfl_xor_sync(~0u, sum, apart);
    if (from_part == 0) shares[of_block] = sum > 0 ? 1.0f / sum : 0.0f;
  }
  __syncthreads();
  for (int item = threadIdx.x; item < kQueries * (HEAD / 4); item += kThreads) {
    const int of_block = item / (HEAD / 4), four = item % (HEAD / 4) * 4;
    if ((first_query + of_block) / GROUP >= rows) continue;
    float4 mix = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int index = 0; index < active; ++index) {
      const float weight = weights[index * kQueries + of_block];
      const float4 given = __ldcg(reinterpret_cast<const float4*>(all_parts + index * kPart + of_block * HEAD + four));
      mix.x = __fmaf_rn(weight, given.x, mix.x);
      mix.y = __fmaf_rn(weight, given.y, mix.y);
      mix.z = __fmaf_rn(weight, given.z, mix.z);
      mix.w = __fmaf_rn(weight, given.w, mix.w);
    }
    const float share = shares[of_block];
    *reinterpret_cast<uint2*>(result_of(first_query + of_block) + four) =
        make_uint2(halves_of(mix.x * share, mix.y * share), halves_of(mix.z * share, mix.w * share));
  }
  if (threadIdx.x == 0) tickets[group_of_parts] = 0;
}
