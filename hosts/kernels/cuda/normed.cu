// RMSNorm of a residual stream and what is added to it, on NVIDIA GPUs: as a kernel of its own, before products that
// others compute, and for ours, which lie behind this text and do it themselves (products.cu). Sums are float16, as the
// stream is; squares, the root and its products are float32, and what comes of them is rounded once.

namespace {

__device__ __forceinline__ float2 wide2(unsigned int pair) {
  float2 both;
  asm("{ .reg .f16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(both.x), "=f"(both.y)
      : "r"(pair));
  return both;
}

__device__ __forceinline__ unsigned int narrow2(float low, float high) {
  unsigned int pair;
  asm("{ .reg .f16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high}; }"
      : "=r"(pair)
      : "f"(low), "f"(high));
  return pair;
}

__device__ __forceinline__ unsigned int sum2(unsigned int a, unsigned int b) {
  unsigned int sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

__device__ __forceinline__ float squares_of(unsigned int pair) {
  const float2 both = wide2(pair);
  return both.x * both.x + both.y * both.y;
}

__device__ __forceinline__ float squares_of(const uint4& eight) {
  return squares_of(eight.x) + squares_of(eight.y) + squares_of(eight.z) + squares_of(eight.w);
}

__device__ __forceinline__ unsigned int normed(unsigned int pair, float inverse, unsigned int times) {
  const float2 both = wide2(pair), by = wide2(times);
  return narrow2(both.x * inverse * by.x, both.y * inverse * by.y);
}

__device__ __forceinline__ uint4 normed(const uint4& eight, float inverse, const uint4& times) {
  return make_uint4(normed(eight.x, inverse, times.x), normed(eight.y, inverse, times.y),
                    normed(eight.z, inverse, times.z), normed(eight.w, inverse, times.w));
}

}  // namespace

// x, skip: float16 [rows][2 * pairs], norm: float16 [2 * pairs], y, added: as x; added is x + skip. The grid is (rows).
extern "C" __global__ void norm_rows(const unsigned int* __restrict__ x, const unsigned int* __restrict__ skip,
                                     const unsigned int* __restrict__ norm, unsigned int* __restrict__ y,
                                     unsigned int* __restrict__ added, int pairs, float epsilon) {
  __shared__ float of_warps[32];
  const long long first = (long long)blockIdx.x * pairs;
  float sum = 0;
  for (int index = threadIdx.x; index < pairs; index += blockDim.x) {
    const unsigned int both = sum2(x[first + index], skip[first + index]);
    added[first + index] = both;
    sum += squares_of(both);
  }
  for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(~0u, sum, apart);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int warp = 0; warp < blockDim.x / 32; ++warp) sum += of_warps[warp];
  const float inverse = rsqrtf(sum / (2 * pairs) + epsilon);
  for (int index = threadIdx.x; index < pairs; index += blockDim.x)
    y[first + index] = normed(added[first + index], inverse, norm[index]);
}
