#include "manifest.hpp"

#include <sstream>

#include "error.hpp"
#include "json_reader.hpp"
#include "sha256.hpp"

namespace mirror {
namespace {

namespace fs = std::filesystem;

constexpr const char* manifest_name = "mirror.json";
const std::vector<std::string> dtypes = {"float32", "float16", "bfloat16", "int64", "int32"};
const std::vector<std::string> precisions = {"fp32", "fp16", "bf16", "int8", "int4", "int8-fp16", "int4-fp16"};
const std::vector<std::string> dimensions = {"width", "capacity", "rows"};
const std::vector<std::string> segment_names = {"target_prefix", "target_suffix", "exit_head",  "draft",
                                                "draft_trunk",   "draft_sampled", "draft_int8", "draft_trunk_int8"};

int small(std::int64_t number) { return static_cast<int>(std::min<std::int64_t>(number, INT32_MAX)); }

std::vector<int> small(const std::vector<std::int64_t>& numbers) {
  std::vector<int> result;
  for (const std::int64_t number : numbers) result.push_back(small(number));
  return result;
}

DType parse_dtype(const std::string& text) {
  return static_cast<DType>(std::find(dtypes.begin(), dtypes.end(), text) - dtypes.begin());
}

std::vector<Dimension> read_shape(JsonObject& tensor) {
  std::vector<Dimension> shape;
  for (const Json& item : tensor.array("shape")) {
    if (item.is_number_integer() && item.get<std::int64_t>() >= 0)
      shape.emplace_back(item.get<std::int64_t>());
    else if (item.is_string() && std::count(dimensions.begin(), dimensions.end(), item.get<std::string>()) > 0)
      shape.emplace_back(item.get<std::string>());
    else
      tensor.fail("shape." + std::to_string(shape.size()),
                  python_text(item) + " is not valid under any of the given schemas");
  }
  return shape;
}

std::vector<TensorSpec> read_tensors(JsonObject& graph, const char* key) {
  std::vector<TensorSpec> tensors;
  for (const Json& item : graph.array(key)) {
    JsonObject tensor = graph.item(item, std::string(key) + "." + std::to_string(tensors.size()));
    std::string name = tensor.text("name");
    const DType dtype = parse_dtype(tensor.choice("dtype", dtypes));
    tensors.push_back({std::move(name), dtype, read_shape(tensor)});
    tensor.end();
  }
  return tensors;
}

Graph read_graph(JsonObject graph) {
  Graph result{graph.text("file"), read_tensors(graph, "inputs"), read_tensors(graph, "outputs")};
  graph.end();
  return result;
}

std::vector<LayerKV> read_kv(JsonObject& segment) {
  std::vector<LayerKV> layers;
  for (const Json& item : segment.array("kv")) {
    JsonObject layer = segment.item(item, "kv." + std::to_string(layers.size()));
    LayerKV facts{small(layer.number("layer", 0)), small(layer.number("heads", 1)), small(layer.number("head_dim", 1)),
                  parse_dtype(layer.choice("dtype", dtypes))};
    layer.end();
    layers.push_back(facts);
  }
  return layers;
}

SegmentFacts read_segment(JsonObject segment) {
  SegmentFacts facts;
  facts.name = segment.text("name");
  facts.kv = read_kv(segment);
  JsonObject graphs = segment.object("graphs");
  if (graphs.value().empty()) segment.fail("graphs", "{} should be non-empty");
  if (graphs.has("inplace")) facts.graphs.emplace(Form::inplace, read_graph(graphs.object("inplace")));
  if (graphs.has("rows")) facts.graphs.emplace(Form::rows, read_graph(graphs.object("rows")));
  graphs.end();
  // What the Python package compiled ahead of time for its own devices; the graphs serve here.
  if (segment.has("compiled")) segment.array("compiled");
  if (segment.has("program")) facts.program = segment.text("program");
  segment.end();
  return facts;
}

std::map<std::string, SegmentFacts> read_segments(JsonObject segments) {
  std::map<std::string, SegmentFacts> result;
  for (const auto& [name, item] : segments.value().items()) {
    if (std::count(segment_names.begin(), segment_names.end(), name) == 0)
      segments.fail("", "'" + name +
                            "' is not one of ['target_prefix', 'target_suffix', 'exit_head', 'draft', 'draft_trunk', "
                            "'draft_sampled', 'draft_int8', 'draft_trunk_int8']");
    result.emplace(name, read_segment(segments.item(item, name)));
  }
  for (const char* name : {"target_prefix", "target_suffix", "exit_head"}) segments.any(name);
  return result;
}

std::map<std::string, FileFacts> read_files(JsonObject files) {
  std::map<std::string, FileFacts> result;
  for (const auto& [name, item] : files.value().items()) {
    JsonObject file = files.item(item, name);
    result[name] = {static_cast<std::uintmax_t>(file.number("bytes", 0)), file.hash("sha256")};
    file.end();
  }
  return result;
}

void check_producer(JsonObject producer) {
  for (const char* key : {"version", "source", "command"}) producer.text(key);
  producer.end();
}

ModelFacts read_model(JsonObject model) {
  ModelFacts facts;
  facts.architecture = model.text("architecture");
  facts.model_type = model.text("model_type");
  facts.layers = small(model.number("layers", 1));
  facts.hidden_size = small(model.number("hidden_size", 1));
  facts.vocab_size = small(model.number("vocab_size", 1));
  facts.max_positions = small(model.number("max_positions", 1));
  facts.precision = model.choice("precision", precisions);
  facts.fingerprint = model.hash("fingerprint");
  model.end();
  return facts;
}

Decoding read_decoding(JsonObject decoding) {
  Decoding facts{small(decoding.number("exit_layer", 1)), small(decoding.number("gamma", 1)),
                 small(decoding.number("kappa", 1)), small(decoding.number("max_length", 1)),
                 small(decoding.number("prefill_chunk", 1))};
  if (decoding.has("trained_exits")) decoding.numbers("trained_exits", 1);
  decoding.end();
  return facts;
}

SpecialTokens read_tokens(JsonObject tokens) {
  SpecialTokens facts;
  facts.bos = tokens.nullable_number("bos");
  facts.eos = tokens.numbers("eos", 0);
  facts.pad = tokens.nullable_number("pad");
  tokens.hash("tokenizer_fingerprint");
  tokens.end();
  return facts;
}

std::optional<DraftFacts> read_draft(JsonObject& top) {
  if (top.any("draft").is_null()) return std::nullopt;
  JsonObject draft = top.object("draft");
  DraftFacts facts;
  facts.kind = draft.choice("kind", {"model", "ngram"});
  facts.source = draft.text("source");
  facts.layers = small(draft.number("layers", 0));
  facts.vocab_size = small(draft.number("vocab_size", 1));
  facts.vocabulary = small(draft.number("vocabulary", 1));
  facts.streams = small(draft.number("streams", 0));
  if (const auto layer = draft.nullable_number("feature_layer")) facts.feature_layer = small(*layer);
  draft.end();
  return facts;
}

Settings read_settings(JsonObject found) {
  const auto lists = [&found](const char* key, std::int64_t minimum) -> std::optional<std::vector<int>> {
    const auto numbers = found.nullable_numbers(key, minimum);
    if (!numbers) return std::nullopt;
    return small(*numbers);
  };
  Settings facts;
  if (const auto mode = found.nullable_choice("mode", {"plain", "serial", "mirror"})) facts.mode = parse_mode(*mode);
  if (const auto source = found.nullable_choice("candidates", {"exit", "draft", "both"}))
    facts.candidates = parse_source(*source);
  if (!found.is_null("gamma")) facts.gamma = small(found.number("gamma", 1));
  facts.fanout = lists("fanout", 0);
  facts.tokens_per_pass = lists("tokens_per_pass", 1);
  facts.branches_per_pass = lists("branches_per_pass", 1);
  facts.proposal_tokens_per_pass = lists("proposal_tokens_per_pass", 1);
  facts.adapt_branches = found.nullable_boolean("adapt_branches").value_or(false);
  if (!found.is_null("draft_context")) facts.draft_context = small(found.number("draft_context", 2));
  facts.target_device = found.nullable_text("target_device");
  facts.suffix_device = found.nullable_text("suffix_device");
  facts.draft_device = found.nullable_text("draft_device");
  found.end();
  return facts;
}

std::map<std::string, std::string> read_texts(JsonObject found) {
  static const std::vector<std::string> after = {"system", "user", "assistant", "answer"};
  std::map<std::string, std::string> texts;
  for (const auto& [key, item] : found.value().items()) {
    if (std::count(after.begin(), after.end(), key) == 0) found.fail("", not_among(key, after));
    texts[key] = found.text(key.c_str());
  }
  return texts;
}

// Directives that are numbers or English names in every host.
std::optional<std::string> read_date(JsonObject& chat) {
  const auto date = chat.nullable_text("date");
  if (!date) return date;
  const std::string pattern = "^(%[dbBymYaAj]|[ ,./-])+$";
  const std::string directives = "dbBymYaAj", between = " ,./-";
  bool good = !date->empty();
  for (std::size_t at = 0; good && at < date->size(); ++at)
    good = between.find((*date)[at]) != std::string::npos ||
           ((*date)[at] == '%' && ++at < date->size() && directives.find((*date)[at]) != std::string::npos);
  if (!good) chat.fail("date", python_text(*date) + " does not match '" + pattern + "'");
  return date;
}

std::optional<ChatFormat> read_chat(JsonObject& top) {
  static const std::vector<std::string> before = {"start", "system", "user", "assistant"},
                                        roles = {"system", "user", "assistant"};
  if (top.is_null("chat")) return std::nullopt;
  if (!top.value()["chat"].is_object())
    top.fail("chat", python_text(top.value()["chat"]) + " is not of type 'object', 'null'");
  JsonObject chat = top.object("chat"), joins = chat.object("joins");
  ChatFormat format{{}, chat.texts("trimmed", roles), chat.texts("refused"), chat.boolean("empty"), read_date(chat)};
  for (const auto& [key, item] : joins.value().items()) {
    if (std::count(before.begin(), before.end(), key) == 0) joins.fail("", not_among(key, before));
    format.joins[key] = read_texts(joins.item(item, key));
  }
  chat.end();
  return format;
}

void check_version(const std::string& file, const Json& data) {
  const Json found = data.is_object() && data.contains("schema_version") ? data["schema_version"] : Json();
  if (found.is_number_integer() && found == schema_version) return;
  throw Error(ErrorKind::bundle, file + " has schema version " + python_text(found) + ", this mirror reads " +
                                     std::to_string(schema_version) + "; export the bundle again with this version");
}

void check_file(const fs::path& folder, const std::string& name, const FileFacts& facts, bool hashes) {
  const fs::path path = folder / fs::u8path(name);
  std::error_code code;
  if (!fs::is_regular_file(path, code))
    throw Error(ErrorKind::bundle, name + " is missing from " + folder.string() + "; export the bundle again");
  const std::uintmax_t size = fs::file_size(path, code);
  if (size != facts.bytes)
    throw Error(ErrorKind::bundle, name + " has " + std::to_string(size) + " bytes, " + manifest_name + " says " +
                                       std::to_string(facts.bytes) +
                                       ": it was truncated or edited; export the bundle again");
  if (hashes && file_sha256(path) != facts.sha256)
    throw Error(ErrorKind::bundle, name + " does not have the sha256 that " + manifest_name +
                                       " says: it was edited; export the bundle again");
}

const TensorSpec* find(const std::vector<TensorSpec>& specs, const std::string& name) {
  for (const TensorSpec& spec : specs)
    if (spec.name == name) return &spec;
  return nullptr;
}

}  // namespace

std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::int64: return 8;
    case DType::float16:
    case DType::bfloat16: return 2;
    default: return 4;
  }
}

const TensorSpec* Graph::input(const std::string& name) const { return find(inputs, name); }
const TensorSpec* Graph::output(const std::string& name) const { return find(outputs, name); }

const SegmentFacts& Manifest::segment(const std::string& name) const {
  const auto found = segments.find(name);
  if (found == segments.end()) throw Error(ErrorKind::bundle, "the bundle has no " + name + "; export it again");
  return found->second;
}

Manifest read_manifest(const fs::path& folder) {
  std::error_code code;
  if (!fs::is_directory(folder, code))
    throw Error(ErrorKind::bundle,
                "no bundle at " + folder.string() + ": the folder does not exist; make one with `mirror export`");
  const fs::path path = folder / manifest_name;
  if (!fs::is_regular_file(path, code))
    throw Error(ErrorKind::bundle,
                folder.string() + " is not a bundle: it has no " + manifest_name + "; make one with `mirror export`");
  const Json data = read_json(path);
  check_version(path.string(), data);
  JsonObject top(data, path.string(), "");
  top.any("schema_version");
  check_producer(top.object("producer"));
  Manifest manifest{read_model(top.object("model")),       read_decoding(top.object("decoding")),
                    read_tokens(top.object("tokens")),     read_draft(top),
                    read_segments(top.object("segments")), read_files(top.object("files")),
                    read_settings(top.object("settings")), read_chat(top)};
  top.end();
  return manifest;
}

void check_files(const fs::path& folder, const Manifest& manifest, bool hashes) {
  for (const auto& [name, facts] : manifest.files) check_file(folder, name, facts, hashes);
}

std::string to_string(Form form) { return form == Form::inplace ? "inplace" : "rows"; }

std::string to_string(Mode mode) { return mode == Mode::plain ? "plain" : mode == Mode::serial ? "serial" : "mirror"; }

Mode parse_mode(const std::string& text) {
  for (const Mode mode : {Mode::plain, Mode::serial, Mode::mirror})
    if (text == to_string(mode)) return mode;
  throw Error(ErrorKind::request, "mode is '" + text + "'; it must be one of plain, serial, mirror");
}

CandidateSource parse_source(const std::string& text) {
  if (text == "exit") return CandidateSource::exit;
  if (text == "draft") return CandidateSource::draft;
  if (text == "both") return CandidateSource::both;
  throw Error(ErrorKind::request, "candidates is '" + text + "'; it must be one of exit, draft, both");
}

}  // namespace mirror
