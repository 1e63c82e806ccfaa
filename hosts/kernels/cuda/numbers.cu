// float16 numbers, integers that become such, and the matrix units: what lies before the text of every kernel.

using u32 = unsigned int;
using u16 = unsigned short;

namespace {

__device__ __forceinline__ u16 half_of(float value) {
  u16 half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

__device__ __forceinline__ float widened(u16 half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

__device__ __forceinline__ u32 add2(u32 a, u32 b) {
  u32 sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

__device__ __forceinline__ u32 times2(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}

__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 sum;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
  return sum;
}

// (bits & mask) | 1024 as two float16 numbers: an integer in the lowest bits adds itself.
template <u32 mask>
__device__ __forceinline__ u32 on_1024(u32 bits) {
  u32 both;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(both) : "r"(bits), "n"(mask), "r"(0x64006400u));
  return both;
}

// Two words of weights become pairs of float16 numbers; `pairs` are those of inputs (0, 4), (1, 5), (2, 6), (3, 7) for
// four bits, (0, 1), (2, 3) for eight.
__device__ __forceinline__ void unpack4(u32 word, u32 scale, u32 pairs[4]) {
  const u32 minus_1032 = 0xe408e408u, sixteenth = 0x2c002c00u, minus_72 = 0xd480d480u;
  const u32 high = word >> 8;
  pairs[0] = times2(add2(on_1024<0x000f000fu>(word), minus_1032), scale);
  pairs[1] = times2(fma2(on_1024<0x00f000f0u>(word), sixteenth, minus_72), scale);
  pairs[2] = times2(add2(on_1024<0x000f000fu>(high), minus_1032), scale);
  pairs[3] = times2(fma2(on_1024<0x00f000f0u>(high), sixteenth, minus_72), scale);
}

// Eight inputs in the order of those pairs.
__device__ __forceinline__ uint4 paired4(const uint4& eight) {
  return make_uint4(__byte_perm(eight.x, eight.z, 0x5410), __byte_perm(eight.x, eight.z, 0x7632),
                    __byte_perm(eight.y, eight.w, 0x5410), __byte_perm(eight.y, eight.w, 0x7632));
}

__device__ __forceinline__ void unpack8(u32 word, u32 scale, u32 pairs[2]) {
  const u32 minus_1152 = 0xe480e480u;
  pairs[0] = times2(add2(__byte_perm(word, 0x64646464u, 0x4140), minus_1152), scale);
  pairs[1] = times2(add2(__byte_perm(word, 0x64646464u, 0x4342), minus_1152), scale);
}

__device__ __forceinline__ void multiply(float sums[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 word_of(const uint4& four, int index) {
  return index == 0 ? four.x : index == 1 ? four.y : index == 2 ? four.z : four.w;
}

}  // namespace
