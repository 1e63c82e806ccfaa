#include "draft_program.hpp"

#include <cstring>
#include <map>

#include "json_reader.hpp"

namespace mirror {
namespace {

namespace fs = std::filesystem;

using Shape = std::vector<std::int64_t>;

constexpr std::int64_t known_format = 1;
constexpr std::int64_t most_rows = 1 << 24, most_heads = 1 << 12;  // products of two fit into 64 bits many times over
constexpr int block = 32;                                          // numbers that share an embedding's scale
const std::vector<std::string> storages = {"float32", "float16", "bfloat16", "blocks_4", "blocks_8"};
const std::vector<std::string> floats = {"float32", "float16", "bfloat16"};

Storage storage_of(const std::string& name) {
  return static_cast<Storage>(std::find(storages.begin(), storages.end(), name) - storages.begin());
}

std::int64_t item_bytes(const std::string& dtype) {
  static const std::map<std::string, std::int64_t> sizes = {{"float32", 4}, {"float16", 2}, {"bfloat16", 2},
                                                            {"int8", 1},    {"uint8", 1},   {"int64", 8}};
  return sizes.at(dtype);
}

std::int64_t count_of(const Shape& shape) {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) count *= size;
  return count;
}

Bytes copied(const std::byte* from, std::size_t count) {
  const std::shared_ptr<std::byte[]> bytes(new std::byte[count]);
  std::memcpy(bytes.get(), from, count);
  return {bytes, bytes.get()};
}

// What base64 stands for, as far as it is base64.
std::string decoded(const std::string& text) {
  static const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  std::uint32_t bits = 0;
  int waiting = 0;
  for (const char letter : text) {
    const std::size_t digit = digits.find(letter);
    if (digit == std::string::npos) break;
    bits = bits << 6 | static_cast<std::uint32_t>(digit);
    waiting += 6;
    if (waiting < 8) continue;
    waiting -= 8;
    bytes.push_back(static_cast<char>(bits >> waiting & 255));
  }
  return bytes;
}

int size(JsonObject& object, const char* key, std::int64_t minimum, std::int64_t most) {
  const std::int64_t found = object.number(key, minimum);
  if (found > most) object.fail(key, std::to_string(found) + " is more than any draft has");
  return static_cast<int>(found);
}

class Reader {
 public:
  explicit Reader(const fs::path& folder) : folder_(folder) {}

  DraftProgram program(JsonObject& top) const {
    DraftProgram made;
    for (const auto& [key, place] : {std::pair{"hidden", &made.hidden}, std::pair{"inner", &made.inner},
                                     std::pair{"tokens", &made.tokens}, std::pair{"positions", &made.positions}})
      *place = size(top, key, 1, most_rows);
    for (const auto& [key, place] : {std::pair{"heads", &made.heads}, std::pair{"kv_heads", &made.kv_heads},
                                     std::pair{"head_dim", &made.head_dim}})
      *place = size(top, key, 1, most_heads);
    made.streams = size(top, "streams", 0, most_rows);
    made.epsilon = static_cast<float>(top.real("epsilon"));
    made.scale = static_cast<float>(top.real("scale"));
    made.embedding = embedding(top.object("embedding"), made);
    made.stream_rows = maybe(top, "stream_rows", "float32", {made.streams, made.hidden});
    made.cosines = tensor(top, "cosines", {"float32"}, {made.positions, made.head_dim / 2}).bytes;
    made.sines = tensor(top, "sines", {"float32"}, {made.positions, made.head_dim / 2}).bytes;
    for (const Json& item : top.array("layers"))
      made.layers.push_back(layer(top.item(item, "layers." + std::to_string(made.layers.size())), made));
    made.norm = tensor(top, "norm", {"float32"}, {made.hidden}).bytes;
    made.head = matrix(top, "head", made.hidden, std::nullopt);
    made.vocabulary = maybe(top, "vocabulary", "int64", {made.head.out});
    return made;
  }

 private:
  struct Tensor {
    std::string dtype;
    Bytes bytes;
  };

  ProgramEmbedding embedding(JsonObject table, const DraftProgram& sizes) const {
    const std::string kind = table.choice("kind", storages);
    ProgramEmbedding made;
    made.storage = storage_of(kind);
    if (made.storage < Storage::blocks_4) {
      made.values = tensor(table, "values", {kind}, {sizes.tokens, sizes.hidden}).bytes;
      return made;
    }
    if (sizes.hidden % block != 0)
      table.fail("kind", "'" + kind + "' has blocks of 32 numbers, and rows have " + std::to_string(sizes.hidden));
    const int packed = made.storage == Storage::blocks_4 ? sizes.hidden / 2 : sizes.hidden;
    made.values = tensor(table, "values", {"uint8"}, {sizes.tokens, packed}).bytes;
    const Tensor scales = tensor(table, "scales", floats, {sizes.tokens, sizes.hidden / block});
    made.scale_storage = storage_of(scales.dtype);
    made.scales = scales.bytes;
    return made;
  }

  ProgramLayer layer(JsonObject found, const DraftProgram& sizes) const {
    const int all_heads = sizes.heads * sizes.head_dim;
    ProgramLayer made;
    made.attention_norm = tensor(found, "attention_norm", {"float32"}, {sizes.hidden}).bytes;
    made.query_norm = maybe(found, "query_norm", "float32", {sizes.head_dim});
    made.key_norm = maybe(found, "key_norm", "float32", {sizes.head_dim});
    made.mlp_norm = tensor(found, "mlp_norm", {"float32"}, {sizes.hidden}).bytes;
    made.qkv = matrix(found, "qkv", sizes.hidden, all_heads + 2 * sizes.kv_heads * sizes.head_dim);
    made.output = matrix(found, "output", all_heads, sizes.hidden);
    made.gate_up = matrix(found, "gate_up", sizes.hidden, 2 * sizes.inner);
    made.down = matrix(found, "down", sizes.inner, sizes.hidden);
    return made;
  }

  // `out`: as many as its values say, if not given.
  ProgramMatrix matrix(JsonObject& parent, const char* key, int in, std::optional<int> out) const {
    JsonObject found = parent.object(key);
    ProgramMatrix made;
    made.in = in;
    if (!out) {
      const Shape shape = found.object("values").numbers("shape", 1);
      if (shape.size() != 2 || shape[1] > most_rows) found.fail("values.shape", "it is not that of a matrix");
      out = static_cast<int>(shape[1]);
    }
    made.out = *out;
    made.values = tensor(found, "values", {"int8"}, {in, *out}).bytes;
    made.scales = tensor(found, "scales", {"float32"}, {*out}).bytes;
    made.bias = maybe(found, "bias", "float32", {*out});
    return made;
  }

  Bytes maybe(JsonObject& parent, const char* key, const char* dtype, const Shape& shape) const {
    return parent.is_null(key) ? nullptr : tensor(parent, key, {dtype}, shape).bytes;
  }

  Tensor tensor(JsonObject& parent, const char* key, const std::vector<std::string>& dtypes, const Shape& shape) const {
    JsonObject found = parent.object(key);
    const std::string dtype = found.choice("dtype", dtypes);
    if (found.numbers("shape", 0) != shape)
      found.fail("shape", python_text(found.any("shape")) + " is not " + python_text(Json(shape)));
    const std::int64_t item = item_bytes(dtype);
    const Bytes bytes = stored(found, item * count_of(shape));
    if (reinterpret_cast<std::uintptr_t>(bytes.get()) % static_cast<std::uintptr_t>(item) == 0) return {dtype, bytes};
    return {dtype, copied(bytes.get(), static_cast<std::size_t>(item * count_of(shape)))};
  }

  Bytes stored(JsonObject& tensor, std::int64_t count) const {
    const bool is_inside = tensor.has("data");
    if (!is_inside && tensor.number("bytes", 0) == count)
      return file_bytes(folder_ / fs::u8path(tensor.text("file")),
                        static_cast<std::uint64_t>(tensor.number("offset", 0)), static_cast<std::uint64_t>(count));
    const std::string bytes = is_inside ? decoded(tensor.text("data")) : "";
    if (bytes.size() != static_cast<std::size_t>(count))
      tensor.fail(is_inside ? "data" : "bytes", "there are not the " + std::to_string(count) + " bytes of its shape");
    return copied(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size());
  }

  const fs::path& folder_;
};

}  // namespace

std::optional<DraftProgram> read_draft_program(const fs::path& folder, const std::string& file) {
  const fs::path path = folder / fs::u8path(file);
  const Json data = read_json(path);
  JsonObject top(data, path.string(), "");
  if (top.number("format", 1) != known_format) return std::nullopt;
  return Reader(folder).program(top);
}

}  // namespace mirror
