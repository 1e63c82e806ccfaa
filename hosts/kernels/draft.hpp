// What the parts of the kernels share. Plain data only: files that are compiled for one instruction set include this,
// and no function of theirs may be taken by the linker for another's.
#pragma once

#include <stdint.h>

#include "draft_pass.h"
#include "team.hpp"

// Loops of a constant length over what is to stay in registers.
#if defined(__clang__)
#define MIRROR_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define MIRROR_UNROLL _Pragma("GCC unroll 16")
#else
#define MIRROR_UNROLL
#endif

namespace mirror_kernels {

constexpr int tile_columns = 16;   // outputs that lie side by side
constexpr int padded_inputs = 64;  // inputs are padded to a multiple of it: a row of a matrix unit's tile

MIRROR_INLINE int up_to(int number, int step) { return (number + step - 1) / step * step; }

// A linear layer: int8 [out / 16][in / 4][16][4], zeros past its ends.
struct Matrix {
  const int8_t* values = nullptr;
  const int32_t* offsets = nullptr;  // [out], 128 times the sum of each output's weights: inputs are stored plus 128
  const int32_t* block_offsets =
      nullptr;                    // the same by 64 inputs, [out / 16][in / 64][16]; null if rows have one scale
  const float* scales = nullptr;  // [out]
  const float* bias = nullptr;    // [out] or null
  int in = 0, out = 0, tiles = 0;

  MIRROR_INLINE int row_bytes() const { return up_to(in, padded_inputs); }
  MIRROR_INLINE const int8_t* tile(int number) const {
    return values + static_cast<int64_t>(number) * row_bytes() * tile_columns;
  }
};

struct Layer {
  const float *attention_norm = nullptr, *query_norm = nullptr, *key_norm = nullptr, *mlp_norm = nullptr;
  Matrix qkv, output, gate_up, down;
};

struct Draft {
  int hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, inner = 0, layer_count = 0;
  int tokens = 0, streams = 0, positions = 0;
  float epsilon = 0, scale = 0;
  bool fine = false;  // rows are rounded by a scale for each 64 numbers, not by one
  mirror_embedding embedding{};
  const float *stream_rows = nullptr, *cosines = nullptr, *sines = nullptr, *norm = nullptr;
  const Layer* layers = nullptr;
  Matrix head;
  const int64_t* vocabulary = nullptr;

  MIRROR_INLINE int group() const { return heads / kv_heads; }
};

// The slots of each branch, ascending.
struct BranchSlots {
  const int32_t* starts = nullptr;  // [branches + 1], into `slots`
  const int32_t* slots = nullptr;
  int branches = 0, most = 0;  // `most`: slots of the largest one
};

constexpr int head_tiles = 16;  // of a part of the vocabulary

// Working memory of a pass.
struct Work {
  float* x = nullptr;           // [width, hidden]
  uint8_t* rounded = nullptr;   // [width + 32, widest], plus 128; a matrix unit reads whole tiles, from any row on
  float* row_scales = nullptr;  // [width, scale_stride]
  float* queries = nullptr;     // [kv_heads, width, group, head_dim], times attention's scale
  float* mixed = nullptr;       // [width, heads * head_dim]
  float* inner = nullptr;       // [width, inner]
  float* logits = nullptr;      // [wanted, head.tiles * 16]; null where only the likeliest is asked for
  float* scratch = nullptr;     // [threads, scratch_size]
  float* best = nullptr;        // [parts of the vocabulary, wanted], each part's greatest logit
  int32_t* best_places = nullptr;
  int64_t scratch_size = 0;
  int rounded_stride = 0, scale_stride = 1;
  BranchSlots branches;
};

using RunPass = void (*)(const Draft&, const Work&, const mirror_draft_pass&, Turn&);

}  // namespace mirror_kernels
