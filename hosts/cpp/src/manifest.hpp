// The bundle contract: mirror.json, the records it holds, and the checks on reading it.
// Knows files and JSON, never tensors. The same contract as mirror/bundle.schema.json.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "records.hpp"

namespace mirror {

inline constexpr int schema_version = 2;

// How a graph keeps its KV cache. inplace: past and present are one buffer, bound as input and as
// output. rows: the graph reads the buffer and returns the new rows; the host writes them.
enum class Form { inplace, rows };

enum class DType { float32, float16, bfloat16, int64, int32 };

std::size_t size_of(DType dtype);

// A dimension: a number, or one of width, capacity, rows.
using Dimension = std::variant<std::int64_t, std::string>;

struct TensorSpec {
  std::string name;
  DType dtype;
  std::vector<Dimension> shape;
};

struct LayerKV {
  int layer, heads, head_dim;
  DType dtype;
};

struct Graph {
  std::string file;
  std::vector<TensorSpec> inputs, outputs;

  const TensorSpec* input(const std::string& name) const;
  const TensorSpec* output(const std::string& name) const;
};

struct SegmentFacts {
  std::string name;
  std::vector<LayerKV> kv;
  std::map<Form, Graph> graphs;
  std::optional<std::string> program;  // the file that says where an int8 draft's weights lie, for kernels of our own
};

struct ModelFacts {
  std::string architecture, model_type, precision, fingerprint;
  int layers, hidden_size, vocab_size, max_positions;
};

struct Decoding {
  int exit_layer, gamma, kappa, max_length, prefill_chunk;
};

struct SpecialTokens {
  std::optional<Token> bos, pad;
  Tokens eos;
};

struct DraftFacts {
  std::string kind, source;
  int layers, vocab_size, vocabulary, streams;
  std::optional<int> feature_layer;
};

// What a host does where the user says nothing.
struct Settings {
  std::optional<Mode> mode;
  std::optional<CandidateSource> candidates;
  std::optional<int> gamma, draft_context;
  std::optional<std::vector<int>> fanout, tokens_per_pass, branches_per_pass, proposal_tokens_per_pass;
  bool adapt_branches = false;  // rollouts take fewer where they end late
  std::optional<std::string> target_device, suffix_device, draft_device;
};

// The model's chat template as data: texts between messages, by what stands before (start, or a role) and
// after (a role, or answer).
struct ChatFormat {
  std::map<std::string, std::map<std::string, std::string>> joins;
  std::vector<std::string> trimmed;  // roles whose contents lose the white space around them
  std::vector<std::string> refused;  // contents that hold one of these are not covered
  bool empty;                        // whether contents without any text are covered
  std::optional<std::string> date;   // how today's date is written where texts say {{date}}, as strftime has it
};

struct FileFacts {
  std::uintmax_t bytes;
  std::string sha256;
};

struct Manifest {
  ModelFacts model;
  Decoding decoding;
  SpecialTokens tokens;
  std::optional<DraftFacts> draft;
  std::map<std::string, SegmentFacts> segments;
  std::map<std::string, FileFacts> files;
  Settings settings;
  std::optional<ChatFormat> chat;

  // Throws Error(bundle) if there is none of that name.
  const SegmentFacts& segment(const std::string& name) const;
};

// The manifest of a bundle folder. Throws Error(bundle): no folder, no file, no JSON, another schema
// version, or the first key that breaks the schema.
Manifest read_manifest(const std::filesystem::path& folder);

// Checks that every file is there with its size, and its sha256 where asked. Throws Error(bundle).
void check_files(const std::filesystem::path& folder, const Manifest& manifest, bool hashes);

std::string to_string(Form form);
std::string to_string(Mode mode);
// Throw Error(request) naming the choices.
Mode parse_mode(const std::string& text);
CandidateSource parse_source(const std::string& text);

}  // namespace mirror
