// What a bundle says of a draft that kernels of our own can run: its program (docs/bundle.md), read and checked, the
// tensors where they lie in the bundle's files. Knows files and JSON, no kernels.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "file_bytes.hpp"

namespace mirror {

// Elements that lie side by side, aligned for their type; null for a tensor that isn't there.
struct ProgramMatrix {
  Bytes values, scales, bias;  // int8 [in, out], float32 [out], float32 [out] or null
  int in = 0, out = 0;
};

struct ProgramLayer {
  Bytes attention_norm, query_norm, key_norm, mlp_norm;  // float32; those of heads may be null
  ProgramMatrix qkv, output, gate_up, down;
};

// How an embedding's rows are stored; blocks are numbers of 4 or 8 bits, with scales of one of the first three.
enum class Storage { float32, float16, bfloat16, blocks_4, blocks_8 };

struct ProgramEmbedding {
  Storage storage = Storage::float32, scale_storage = Storage::float32;
  Bytes values, scales;  // scales: null but for blocks
};

struct DraftProgram {
  int hidden = 0, heads = 0, kv_heads = 0, head_dim = 0, inner = 0, tokens = 0, streams = 0, positions = 0;
  float epsilon = 0, scale = 0;
  ProgramEmbedding embedding;
  Bytes stream_rows;  // float32 [streams, hidden], or null
  Bytes cosines, sines;
  std::vector<ProgramLayer> layers;
  Bytes norm;
  ProgramMatrix head;
  Bytes vocabulary;  // int64 [head.out], or null
};

// The program in a file of a bundle; nothing if its format is one that this version doesn't know, and the graphs are
// to be run. Throws Error(bundle) for what isn't a program, or names tensors that its files don't hold.
std::optional<DraftProgram> read_draft_program(const std::filesystem::path& folder, const std::string& file);

}  // namespace mirror
