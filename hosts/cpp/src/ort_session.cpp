#include "ort_session.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>

#include "error.hpp"
#include "host_memory.hpp"

namespace mirror {
namespace {

const std::string past_prefix = "past_key_values.";
const std::string present_prefix = "present.";

bool begins(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

ONNXTensorElementDataType element_type(DType dtype) {
  switch (dtype) {
    case DType::float32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::bfloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case DType::int64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  }
}

struct Sizes {
  int width, rows;
  std::int32_t capacity;
};

std::vector<std::int64_t> concrete(const TensorSpec& spec, const Sizes& sizes) {
  std::vector<std::int64_t> shape;
  for (const Dimension& dimension : spec.shape) {
    const auto* name = std::get_if<std::string>(&dimension);
    if (name == nullptr)
      shape.push_back(std::get<std::int64_t>(dimension));
    else
      shape.push_back(*name == "width" ? sizes.width : *name == "rows" ? sizes.rows : sizes.capacity);
  }
  return shape;
}

std::size_t byte_count(const std::vector<std::int64_t>& shape, DType dtype) {
  std::size_t count = size_of(dtype);
  for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
  return count;
}

Ort::Value view(void* data, std::size_t bytes, const std::vector<std::int64_t>& shape, DType dtype) {
  static const Ort::MemoryInfo host = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor(host, data, bytes, shape.data(), shape.size(), element_type(dtype));
}

Buffer host_buffer(const std::vector<std::int64_t>& shape, DType dtype) {
  const std::size_t bytes = byte_count(shape, dtype);
  Buffer buffer;
  buffer.owner = zeroed_memory(bytes);
  buffer.host = static_cast<std::byte*>(buffer.owner.get());
  buffer.value = view(buffer.host, bytes, shape, dtype);
  buffer.shape = shape;
  buffer.dtype = dtype;
  return buffer;
}

// A buffer in a provider's own memory; the session whose allocator made it lives as long as it does.
Buffer device_buffer(const std::shared_ptr<Ort::Session>& session, const Provider& provider,
                     const std::vector<std::int64_t>& shape, DType dtype) {
  const Ort::MemoryInfo memory(provider.memory.c_str(), OrtDeviceAllocator, provider.index, OrtMemTypeDefault);
  auto allocator = std::make_shared<Ort::Allocator>(*session, memory);
  Buffer buffer;
  buffer.value = Ort::Value::CreateTensor(*allocator, shape.data(), shape.size(), element_type(dtype));
  buffer.owner =
      std::make_shared<std::pair<std::shared_ptr<Ort::Session>, std::shared_ptr<Ort::Allocator>>>(session, allocator);
  buffer.shape = shape;
  buffer.dtype = dtype;
  provider.zero(buffer.value.GetTensorMutableRawData(), byte_count(shape, dtype));
  return buffer;
}

Buffer make_buffer(const std::shared_ptr<Ort::Session>& session, const Provider& provider,
                   const std::vector<std::int64_t>& shape, DType dtype) {
  return provider.on_host() ? host_buffer(shape, dtype) : device_buffer(session, provider, shape, dtype);
}

// Names past_key_values.L.key of present.L.key.
std::string past_name(const std::string& present) { return past_prefix + present.substr(present_prefix.size()); }

struct OrtCache final : KVCache {
  int capacity = 0;
  std::map<std::string, Buffer> buffers;  // by the name of the past
};

// Where the host's own inputs of a catalogue name are.
void* input_data(PassFeeds& feeds, const std::string& name) {
  if (name == "input_ids") return feeds.ids.data();
  if (name == "position_ids") return feeds.positions.data();
  if (name == "logit_rows") return feeds.logit_rows.data();
  if (name == "seqlens_k") return &feeds.seqlens_k;
  if (name == "total_sequence_length") return &feeds.total_sequence_length;
  if (name == "past_length") return &feeds.past_length;
  if (name == "row_visible") return feeds.row_visible.data();
  if (name == "row_branch") return feeds.row_branch.data();
  if (name == "slot_branch") return feeds.slot_branch->data();
  if (name == "feature_rows") return feeds.feature_rows.data();
  if (name == "features") return feeds.features.data();
  return nullptr;
}

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

// What a session is given and asked for by name, where nothing is bound.
class Exchange {
 public:
  void give(const std::string& name, Ort::Value value) {
    given_.push_back(name);
    values_.push_back(std::move(value));
  }
  // `buffer` must stay where it is.
  void ask(const std::string& name, const Buffer& buffer) {
    asked_.push_back(name);
    places_.emplace_back(buffer.host, byte_count(buffer.shape, buffer.dtype));
  }
  void run(Ort::Session& session) const {
    const auto given = pointers(given_), asked = pointers(asked_);
    const auto results =
        session.Run(Ort::RunOptions{}, given.data(), values_.data(), given.size(), asked.data(), asked.size());
    for (std::size_t at = 0; at < results.size(); ++at)
      std::memcpy(places_[at].first, results[at].GetTensorRawData(), places_[at].second);
  }

 private:
  static std::vector<const char*> pointers(const std::vector<std::string>& names) {
    std::vector<const char*> result;
    for (const std::string& name : names) result.push_back(name.c_str());
    return result;
  }

  std::vector<std::string> given_, asked_;
  std::vector<Ort::Value> values_;
  std::vector<std::pair<std::byte*, std::size_t>> places_;
};

// One pass of one size: what it reads, what it writes.
class OrtPass final : public BoundPass {
 public:
  OrtPass(const SegmentFacts& facts, const Graph& graph, const Provider& provider,
          std::shared_ptr<Ort::Session> session, PassFeeds& feeds, Sizes sizes, std::shared_ptr<KVCache> cache)
      : name_(facts.name),
        provider_(provider),
        session_(std::move(session)),
        cache_(std::static_pointer_cast<OrtCache>(cache)),
        sizes_(sizes),
        binding_(*session_) {
    kept_.reserve(graph.outputs.size());  // places in it are kept
    for (const TensorSpec& spec : graph.inputs) bind_input(spec, feeds);
    for (const TensorSpec& spec : graph.outputs) bind_output(spec, feeds);
  }

  void run(int past_length) override {
    if (cache_ && past_length + sizes_.width > cache_->capacity)
      throw Error(ErrorKind::device, name_ + " would write past its cache of " + std::to_string(cache_->capacity) +
                                         " slots; load the bundle with a larger max_length");
    try {
      compute();
    } catch (const Ort::Exception& error) {
      throw Error(ErrorKind::device, name_ + " failed on " + provider_.name + ": " + error.what());
    }
    for (const auto& [past, rows] : new_rows_) write_rows(*past, *rows, past_length);
  }

  const PassOutputs& outputs() const override { return outputs_; }
  const std::byte* hidden() const override { return hidden_ ? hidden_->host : nullptr; }

 private:
  void compute() {
    if (!provider_.binds) {
      exchange_.run(*session_);
      return;
    }
    if (!staged_.empty()) stage();
    session_->Run(options_, binding_);
  }

  void bind_input(const TensorSpec& spec, PassFeeds& feeds) {
    const auto shape = concrete(spec, sizes_);
    if (begins(spec.name, past_prefix)) {
      give(spec.name, past(spec.name), true);
      return;
    }
    if (spec.name == "hidden_states") {
      const auto hidden = std::any_cast<std::shared_ptr<Buffer>>(feeds.hidden_states);
      if (hidden->dtype != spec.dtype || hidden->shape != shape)
        throw Error(ErrorKind::bundle,
                    name_ + " takes other hidden_states than target_prefix gives; export the bundle again");
      hidden_ = hidden;
      give(spec.name, *hidden, provider_.on_host() || hidden->host == nullptr);
      return;
    }
    if (spec.name == "features") feeds.features.resize(byte_count(shape, spec.dtype));
    Buffer input;
    input.host = static_cast<std::byte*>(input_data(feeds, spec.name));
    if (provider_.sized_inputs.count(spec.name) > 0) input.host = reinterpret_cast<std::byte*>(&sizes_.capacity);
    input.value = view(input.host, byte_count(shape, spec.dtype), shape, spec.dtype);
    input.shape = shape;
    input.dtype = spec.dtype;
    inputs_.push_back(std::move(input));
    give(spec.name, inputs_.back(), provider_.on_host());
  }

  // Binding copies what is in another memory, so such inputs are bound again for each run.
  void give(const std::string& name, const Buffer& buffer, bool once) {
    if (!provider_.binds)
      exchange_.give(name, view(buffer.host, byte_count(buffer.shape, buffer.dtype), buffer.shape, buffer.dtype));
    else if (once)
      binding_.BindInput(name.c_str(), buffer.value);
    else
      staged_.emplace_back(name, &buffer.value);
  }

  void stage() {
    for (const auto& [name, value] : staged_) binding_.BindInput(name.c_str(), *value);
    binding_.SynchronizeInputs();
  }

  void bind_output(const TensorSpec& spec, PassFeeds& feeds) {
    if (begins(spec.name, present_prefix)) {
      bind_present(spec);
      return;
    }
    const auto shape = concrete(spec, sizes_);
    if (spec.name == "hidden_states") {
      auto hidden = std::make_shared<Buffer>(
          feeds.hidden_on_host ? host_buffer(shape, spec.dtype) : make_buffer(session_, provider_, shape, spec.dtype));
      feeds.hidden_states = hidden;
      hidden_ = hidden;
      ask(spec.name, *hidden);
      return;
    }
    kept_.push_back(host_buffer(shape, spec.dtype));
    ask(spec.name, kept_.back());
    note_output(spec.name, kept_.back());
  }

  void bind_present(const TensorSpec& spec) {
    Buffer& buffer = past(past_name(spec.name));
    if (provider_.form == Form::inplace) {
      ask(spec.name, buffer);
      return;
    }
    kept_.push_back(host_buffer(concrete(spec, sizes_), spec.dtype));
    ask(spec.name, kept_.back());
    new_rows_.emplace_back(&buffer, &kept_.back());
  }

  void ask(const std::string& name, const Buffer& buffer) {
    if (provider_.binds)
      binding_.BindOutput(name.c_str(), buffer.value);
    else
      exchange_.ask(name, buffer);
  }

  Buffer& past(const std::string& name) {
    if (!cache_) throw Error(ErrorKind::bundle, name_ + " has no cache for " + name + "; export the bundle again");
    const auto found = cache_->buffers.find(name);
    if (found == cache_->buffers.end())
      throw Error(ErrorKind::bundle, name_ + " has no kv layer for " + name + "; export the bundle again");
    return found->second;
  }

  void note_output(const std::string& name, const Buffer& buffer) {
    const auto* ids = reinterpret_cast<const std::int64_t*>(buffer.host);
    if (name == "logits") outputs_.logits = reinterpret_cast<const float*>(buffer.host);
    if (name == "token_ids") outputs_.token_ids = ids;
    if (name == "candidate_logprobs") outputs_.candidate_logprobs = reinterpret_cast<const float*>(buffer.host);
    if (name != "candidate_ids") return;
    outputs_.candidate_ids = ids;
    outputs_.top = static_cast<int>(buffer.shape.back());
  }

  // Copies rows [1, heads, width, head_dim] to slots past_length.. of [1, heads, capacity, head_dim].
  static void write_rows(Buffer& past, const Buffer& rows, int past_length) {
    const auto heads = static_cast<std::size_t>(rows.shape[1]);
    const std::size_t row_bytes = static_cast<std::size_t>(rows.shape[3]) * size_of(rows.dtype);
    const std::size_t count = static_cast<std::size_t>(rows.shape[2]),
                      capacity = static_cast<std::size_t>(past.shape[2]);
    for (std::size_t head = 0; head < heads; ++head)
      std::memcpy(past.host + (head * capacity + static_cast<std::size_t>(past_length)) * row_bytes,
                  rows.host + head * count * row_bytes, count * row_bytes);
  }

  std::string name_;
  const Provider provider_;
  std::shared_ptr<Ort::Session> session_;
  std::shared_ptr<OrtCache> cache_;
  std::shared_ptr<Buffer> hidden_;
  Sizes sizes_;
  Ort::IoBinding binding_;
  Ort::RunOptions options_;
  Exchange exchange_;
  std::deque<Buffer> inputs_;  // a deque: staged_ points into it
  std::vector<std::pair<std::string, const Ort::Value*>> staged_;
  std::vector<Buffer> kept_;
  std::vector<std::pair<Buffer*, const Buffer*>> new_rows_;
  PassOutputs outputs_;
};

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
                       std::vector<int> widths, const std::vector<PassShape>& shapes)
    : facts_(facts),
      graph_(graph),
      provider_(std::move(provider)),
      capacity_(capacity),
      open_(std::move(open)),
      widths_(std::move(widths)) {
  check_graph(facts_, graph_);
  std::sort(widths_.begin(), widths_.end());
  if (!provider_.compiles) {
    session({0, 0});
    return;
  }
  for (const PassShape& shape : shapes)
    session({shape.width, !takes_rows() ? 0 : shape.rows > 0 ? shape.rows : shape.width});
}

const std::shared_ptr<Ort::Session>& OrtSegment::session(PassShape shape) {
  auto& found = sessions_[provider_.compiles ? shape : PassShape{0, 0}];
  if (!found) found = std::make_shared<Ort::Session>(open_(graph_, shape));
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
  return std::make_unique<OrtPass>(facts_, graph_, provider_, session(shape), feeds,
                                   Sizes{feeds.width, shape.rows, capacity_}, cache);
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
