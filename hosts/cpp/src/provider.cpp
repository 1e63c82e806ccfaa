#include "provider.hpp"

#include "error.hpp"
#include "host_memory.hpp"

namespace mirror {

const std::string past_prefix = "past_key_values.";
const std::string present_prefix = "present.";

bool begins(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

std::string past_name(const std::string& present) { return past_prefix + present.substr(present_prefix.size()); }

namespace {

ONNXTensorElementDataType element_type(DType dtype) {
  switch (dtype) {
    case DType::float32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::bfloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
    case DType::int64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  }
}

Ort::Value view(const Ort::MemoryInfo& memory, void* data, const std::vector<std::int64_t>& shape, DType dtype) {
  return Ort::Value::CreateTensor(memory, data, byte_count(shape, dtype), shape.data(), shape.size(),
                                  element_type(dtype));
}

Ort::MemoryInfo memory_of(const Provider& provider) {
  return Ort::MemoryInfo(provider.memory.c_str(), OrtDeviceAllocator, provider.index, OrtMemTypeDefault);
}

}  // namespace

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

Ort::Value host_view(void* data, const std::vector<std::int64_t>& shape, DType dtype) {
  static const Ort::MemoryInfo host = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  return view(host, data, shape, dtype);
}

Ort::Value device_view(const Provider& provider, void* data, const std::vector<std::int64_t>& shape, DType dtype) {
  return provider.memory.empty() ? host_view(data, shape, dtype) : view(memory_of(provider), data, shape, dtype);
}

std::shared_ptr<void> device_bytes(const SharedSession& session, const Provider& provider, std::size_t bytes) {
  if (provider.memory.empty()) return zeroed_memory(bytes);
  struct Owner {
    SharedSession session;
    Ort::Allocator allocator;  // goes first
    void* memory;
    ~Owner() { allocator.Free(memory); }
  };
  Ort::Allocator allocator(*session, memory_of(provider));
  void* memory = allocator.Alloc(bytes);
  return {std::shared_ptr<Owner>(new Owner{session, std::move(allocator), memory}), memory};
}

Buffer host_buffer(const std::vector<std::int64_t>& shape, DType dtype) {
  Buffer buffer;
  buffer.owner = zeroed_memory(byte_count(shape, dtype));
  buffer.host = static_cast<std::byte*>(buffer.owner.get());
  buffer.value = host_view(buffer.host, shape, dtype);
  buffer.shape = shape;
  buffer.dtype = dtype;
  return buffer;
}

Buffer make_buffer(const SharedSession& session, const Provider& provider, const std::vector<std::int64_t>& shape,
                   DType dtype) {
  if (!provider.stream) return host_buffer(shape, dtype);
  const std::size_t bytes = byte_count(shape, dtype);
  Buffer buffer;
  buffer.owner = device_bytes(session, provider, bytes);
  buffer.value = device_view(provider, buffer.owner.get(), shape, dtype);
  buffer.shape = shape;
  buffer.dtype = dtype;
  // Bits that mean no number, in a slot that no row sees, would still spoil a product with zero.
  provider.stream->clear(buffer.owner.get(), bytes);
  return buffer;
}

Buffer& OrtCache::at(const std::string& name, const std::string& segment) {
  const auto found = buffers.find(name);
  if (found == buffers.end())
    throw Error(ErrorKind::bundle, segment + " has no kv layer for " + name + "; export the bundle again");
  return found->second;
}

void Hidden::send() const {
  if (!copy) return;
  stream->download(copy.get(), buffer.owner.get(), byte_count(buffer.shape, buffer.dtype));
  copied->renew();
}

Buffer& PassParts::past(const std::string& name) const {
  if (!cache) throw Error(ErrorKind::bundle, facts.name + " has no cache for " + name + "; export the bundle again");
  return cache->at(name, facts.name);
}

std::shared_ptr<Hidden> PassParts::hidden(const TensorSpec& spec) const {
  auto found = std::any_cast<std::shared_ptr<Hidden>>(feeds.hidden_states);
  if (found->buffer.dtype != spec.dtype || found->buffer.shape != concrete(spec, sizes))
    throw Error(ErrorKind::bundle,
                facts.name + " takes other hidden_states than target_prefix gives; export the bundle again");
  return found;
}

void check_slots(const std::string& segment, const OrtCache* cache, int past_length, int width) {
  if (cache != nullptr && past_length + width > cache->capacity)
    throw Error(ErrorKind::device, segment + " would write past its cache of " + std::to_string(cache->capacity) +
                                       " slots; load the bundle with a larger max_length");
}

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

void note(PassOutputs& outputs, const std::string& name, const void* host, const std::vector<std::int64_t>& shape) {
  const auto* ids = static_cast<const std::int64_t*>(host);
  if (name == "token_ids") outputs.token_ids = ids;
  if (name == "candidate_logprobs") outputs.candidate_logprobs = static_cast<const float*>(host);
  if (name != "candidate_ids") return;
  outputs.candidate_ids = ids;
  outputs.top = static_cast<int>(shape.back());
}

}  // namespace mirror
