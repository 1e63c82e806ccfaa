#include "ort_session.hpp"

#include <algorithm>
#include <cstdlib>
#include <set>

#include "error.hpp"
#include "host_memory.hpp"

namespace mirror {
namespace {

// What the catalogue says of a tensor: its type and the symbolic sizes; 0 stands for any number.
struct CatalogueEntry {
  DType dtype;
  std::vector<Dimension> shape;
};

const std::map<std::string, CatalogueEntry>& input_catalogue() {
  static const std::map<std::string, CatalogueEntry> entries = {
      {"input_ids", {DType::int64, {1, "width"}}},   {"position_ids", {DType::int64, {1, "width"}}},
      {"logit_rows", {DType::int64, {"rows"}}},      {"seqlens_k", {DType::int32, {1}}},
      {"total_sequence_length", {DType::int32, {}}}, {"past_length", {DType::int32, {1}}},
      {"row_visible", {DType::int32, {"width"}}},    {"row_branch", {DType::int32, {"width"}}},
      {"slot_branch", {DType::int32, {"capacity"}}}, {"feature_rows", {DType::float32, {"width"}}},
  };
  return entries;
}

[[noreturn]] void refuse(const SegmentFacts& facts, const TensorSpec& spec, const std::string& what) {
  throw Error(ErrorKind::bundle, facts.name + ": " + spec.name + " " + what + "; export the bundle again");
}

void check_input(const SegmentFacts& facts, const TensorSpec& spec) {
  if (begins(spec.name, past_prefix) || spec.name == "hidden_states" || spec.name == "features") return;
  const auto known = input_catalogue().find(spec.name);
  if (known == input_catalogue().end()) refuse(facts, spec, "is not an input that this host computes");
  if (spec.dtype != known->second.dtype || spec.shape != known->second.shape)
    refuse(facts, spec, "has another type or shape than the contract says");
}

// The host reads these, so their sizes must be what it takes them for.
void check_output(const SegmentFacts& facts, const TensorSpec& spec) {
  if (begins(spec.name, present_prefix) || spec.name == "hidden_states") return;
  const std::size_t rank = spec.name == "token_ids" ? 2 : 3;
  const bool ids = spec.name == "token_ids" || spec.name == "candidate_ids";
  const DType dtype = ids ? DType::int64 : DType::float32;
  const bool known = ids || spec.name == "logits" || spec.name == "candidate_logprobs";
  if (!known) refuse(facts, spec, "is not an output that this host reads");
  const bool per_row = spec.shape.size() == rank && std::holds_alternative<std::string>(spec.shape[1]) &&
                       std::get<std::string>(spec.shape[1]) != "capacity";
  if (spec.dtype != dtype || !per_row || (rank == 3 && !std::holds_alternative<std::int64_t>(spec.shape[2])))
    refuse(facts, spec, "has another type or shape than the contract says");
}

void check_kv(const SegmentFacts& facts, const std::vector<TensorSpec>& specs, const std::string& prefix) {
  for (const TensorSpec& spec : specs) {
    if (!begins(spec.name, prefix)) continue;
    const auto names_it = [&](const LayerKV& layer) {
      const std::string start = prefix + std::to_string(layer.layer);
      return (spec.name == start + ".key" || spec.name == start + ".value") && spec.dtype == layer.dtype;
    };
    if (std::none_of(facts.kv.begin(), facts.kv.end(), names_it))
      refuse(facts, spec, "is not among the segment's kv layers");
  }
}

void check_graph(const SegmentFacts& facts, const Graph& graph) {
  for (const TensorSpec& spec : graph.inputs) check_input(facts, spec);
  for (const TensorSpec& spec : graph.outputs) check_output(facts, spec);
  check_kv(facts, graph.inputs, past_prefix);
  check_kv(facts, graph.outputs, present_prefix);
}

std::vector<int> widths_of(const std::vector<PassShape>& shapes, const std::vector<PassShape>& later) {
  std::set<int> widths;
  for (const PassShape& shape : shapes) widths.insert(shape.width);
  for (const PassShape& shape : later) widths.insert(shape.width);
  return {widths.begin(), widths.end()};
}

}  // namespace

Ort::Env& ort_environment() {
  static Ort::Env environment = [] {
  // ONNX Runtime reports usage as soon as its environment is made, unless this says otherwise.
#ifdef _WIN32
    if (std::getenv("ORT_DISABLE_TELEMETRY") == nullptr) _putenv_s("ORT_DISABLE_TELEMETRY", "1");
#else
    setenv("ORT_DISABLE_TELEMETRY", "1", 0);
#endif
    Ort::Env made(ORT_LOGGING_LEVEL_ERROR, "mirror");
    made.DisableTelemetryEvents();
    register_host_memory(made);
    return made;
  }();
  return environment;
}

Ort::SessionOptions session_options(int threads) {
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(threads);
  options.SetInterOpNumThreads(1);
  options.SetLogSeverityLevel(3);
  // A pool's threads may spin within a run but not past its end: there they would hold the core that
  // the next segment's pool needs. docs/log.md has the figures.
  options.AddConfigEntry("session.force_spinning_stop", "1");
  return options;
}

const Graph& graph_of(const SegmentFacts& facts, Form form, const std::string& device) {
  const auto found = facts.graphs.find(form);
  if (found != facts.graphs.end()) return found->second;
  throw Error(ErrorKind::device, device + " needs " + facts.name + " in " + to_string(form) + " form, the bundle has " +
                                     to_string(facts.graphs.begin()->first) + "; export the bundle again");
}

OrtSegment::OrtSegment(const SegmentFacts& facts, const Graph& graph, Provider provider, int capacity, OpenSession open,
                       const std::vector<PassShape>& shapes, const std::vector<PassShape>& later)
    : facts_(facts),
      graph_(graph),
      provider_(std::move(provider)),
      capacity_(capacity),
      open_(std::move(open)),
      widths_(provider_.fixed_widths || provider_.compiles ? widths_of(shapes, later) : std::vector<int>{}) {
  check_graph(facts_, graph_);
  if (!provider_.compiles) {
    session({0, 0});
    return;
  }
  for (const PassShape& shape : shapes)
    session({shape.width, !takes_rows() ? 0 : shape.rows > 0 ? shape.rows : shape.width});
}

const std::shared_ptr<Ort::Session>& OrtSegment::session(PassShape shape) {
  auto& found = sessions_[provider_.compiles ? shape : PassShape{0, 0}];
  if (!found) {
    // A session lives no longer than the stream that it computes on.
    const auto end = [stream = provider_.stream](Ort::Session* made) { delete made; };
    found = SharedSession(new Ort::Session(open_(graph_, shape)), end);
  }
  return found;
}

// A compiled shape of the width with rows enough, else the one to compile: the whole width, so that
// a width is compiled twice at most.
PassShape OrtSegment::covering(PassShape wanted) const {
  for (const auto& [shape, loaded] : sessions_)
    if (shape.width == wanted.width && shape.rows >= wanted.rows) return shape;
  return {wanted.width, wanted.rows > 0 ? wanted.width : 0};
}

std::unique_ptr<BoundPass> OrtSegment::bind(PassFeeds& feeds, int rows, const std::shared_ptr<KVCache>& cache) {
  const PassShape wanted{feeds.width, takes_rows() ? rows : 0};
  const PassShape shape = provider_.compiles ? covering(wanted) : wanted;
  const PassParts parts{facts_,
                        graph_,
                        provider_,
                        session(shape),
                        feeds,
                        {feeds.width, shape.rows, capacity_},
                        std::static_pointer_cast<OrtCache>(cache)};
  return provider_.stream ? bind_stream_pass(parts) : bind_host_pass(parts);
}

std::shared_ptr<KVCache> OrtSegment::make_cache() {
  auto cache = std::make_shared<OrtCache>();
  cache->capacity = capacity_;
  for (const LayerKV& layer : facts_.kv)
    for (const char* part : {".key", ".value"})
      cache->buffers[past_prefix + std::to_string(layer.layer) + part] =
          make_buffer(sessions_.begin()->second, provider_, {1, layer.heads, capacity_, layer.head_dim}, layer.dtype);
  return cache;
}

}  // namespace mirror
