// Reading tokenizer.json; what this host doesn't know is refused by name.

#include "tokenizer_rules.hpp"

#include <algorithm>

#include "error.hpp"
#include "unicode.hpp"

namespace mirror {
namespace {

constexpr const char* gpt2_pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

[[noreturn]] void refuse(const std::string& what) {
  throw Error(ErrorKind::bundle,
              "tokenizer.json has " + what + ", which this host doesn't know; encode in Python, or work with tokens");
}

// GPT-2's map of bytes to printable characters: those that are printable stand for themselves, the
// others for U+0100 and on.
std::array<char32_t, 256> byte_characters() {
  std::array<char32_t, 256> map{};
  char32_t next = 256;
  for (unsigned byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    map[byte] = printable ? byte : next++;
  }
  return map;
}

std::string type_of(const Json& stage) { return stage.is_object() ? stage.value("type", "") : ""; }

// The stages of a Sequence, or the one stage, or none.
std::vector<Json> stages(const Json& stage, const char* list) {
  if (stage.is_null()) return {};
  if (type_of(stage) != "Sequence") return {stage};
  std::vector<Json> all;
  for (const Json& part : stage.at(list))
    for (Json& inner : stages(part, list)) all.push_back(std::move(inner));
  return all;
}

}  // namespace

Tokenizer::Rules::Rules(const Json& file) {
  const auto map = byte_characters();
  for (unsigned byte = 0; byte < 256; ++byte) {
    append_utf8(byte_texts[byte], map[byte]);
    bytes_of[map[byte]] = static_cast<unsigned char>(byte);
  }
  read_model(file.at("model"));
  if (file.contains("added_tokens")) read_added(file["added_tokens"]);
  for (const Json& stage : stages(file.value("normalizer", Json()), "normalizers")) read_normalizer(stage);
  for (const Json& stage : stages(file.value("pre_tokenizer", Json()), "pretokenizers")) read_splitter(stage);
  for (const Json& stage : stages(file.value("post_processor", Json()), "processors")) read_processor(stage);
  for (const Json& stage : stages(file.value("decoder", Json()), "decoders")) read_decoder(stage);
}

void Tokenizer::Rules::read_model(const Json& model) {
  if (const std::string type = model.value("type", "BPE"); type != "BPE") refuse("a model of type " + type);
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (model.contains(key) && model[key].is_string() && !model[key].get<std::string>().empty()) refuse(key);
  for (const auto& [text, id] : model.at("vocab").items()) {
    vocabulary.emplace(text, id.get<Token>());
    texts.emplace(id.get<Token>(), text);
  }
  int rank = 0;
  for (const Json& pair : model.at("merges")) {
    std::string left, right;
    if (pair.is_string()) {
      const auto text = pair.get<std::string>();
      const auto space = text.find(' ');
      left = text.substr(0, space), right = text.substr(space + 1);
    } else {
      left = pair.at(0).get<std::string>(), right = pair.at(1).get<std::string>();
    }
    const auto key =
        (static_cast<std::uint64_t>(vocabulary.at(left)) << 32) | static_cast<std::uint64_t>(vocabulary.at(right));
    merges[key] = {rank++, vocabulary.at(left + right)};
  }
  fuse_unknown = model.value("fuse_unk", false);
  byte_fallback = model.value("byte_fallback", false);
  ignore_merges = model.value("ignore_merges", false);
  if (model.contains("unk_token") && model["unk_token"].is_string())
    unknown = vocabulary.at(model["unk_token"].get<std::string>());
}

void Tokenizer::Rules::read_added(const Json& added_tokens) {
  for (const Json& item : added_tokens) {
    if (item.value("single_word", false)) refuse("an added token with single_word");
    AddedToken token{item.at("id").get<Token>(), item.at("content").get<std::string>(), item.value("lstrip", false),
                     item.value("rstrip", false)};
    added[token.id] = item.value("special", false);
    texts[token.id] = token.content;
    markers.push_back(std::move(token));
  }
  std::stable_sort(markers.begin(), markers.end(),
                   [](const AddedToken& a, const AddedToken& b) { return a.content.size() > b.content.size(); });
}

void Tokenizer::Rules::read_normalizer(const Json& stage) {
  const std::string type = type_of(stage);
  if (type == "NFC")
    normalizers.push_back({Normalizer::Kind::nfc, {}, {}});
  else if (type == "Prepend")
    normalizers.push_back({Normalizer::Kind::prepend, {}, stage.at("prepend").get<std::string>()});
  else if (type == "Replace" && stage.at("pattern").contains("String"))
    normalizers.push_back({Normalizer::Kind::replace, stage["pattern"]["String"].get<std::string>(),
                           stage.at("content").get<std::string>()});
  else
    refuse("a normalizer " + type);
}

void Tokenizer::Rules::read_splitter(const Json& stage) {
  const std::string type = type_of(stage);
  Splitter splitter;
  if (type == "ByteLevel") {
    byte_level = true;
    prefix_space = stage.value("add_prefix_space", true);
    if (!stage.value("use_regex", true)) return;
    splitter.pattern.emplace(gpt2_pattern);
  } else if (type == "Digits") {
    splitter.kind = Splitter::Kind::digits;
    splitter.individual = stage.value("individual_digits", false);
  } else if (type == "Split" && stage.at("pattern").contains("Regex")) {
    splitter.pattern.emplace(stage["pattern"]["Regex"].get<std::string>());
    splitter.behavior = stage.at("behavior").get<std::string>();
    splitter.invert = stage.value("invert", false);
    if (splitter.behavior != "Isolated" && !(splitter.behavior == "Removed" && splitter.invert))
      refuse("a Split with behavior " + splitter.behavior);
  } else if (type == "Metaspace") {
    metaspace = stage.at("replacement").get<std::string>();
    metaspace_split = stage.value("split", true);
    const std::string scheme =
        stage.value("prepend_scheme", stage.value("add_prefix_space", true) ? "always" : "never");
    if (scheme == "first") refuse("a Metaspace with prepend_scheme first");
    metaspace_prepend = scheme == "always";
    return;
  } else {
    refuse("a pre-tokenizer " + type);
  }
  splitters.push_back(std::move(splitter));
}

void Tokenizer::Rules::read_processor(const Json& stage) {
  const std::string type = type_of(stage);
  if (type == "ByteLevel") return;  // moves offsets only
  if (type != "TemplateProcessing") refuse("a post-processor " + type);
  Tokens* side = &before;
  for (const Json& item : stage.at("single")) {
    if (item.contains("Sequence")) {
      side = &after;
      continue;
    }
    for (const Json& id : stage.at("special_tokens").at(item.at("SpecialToken").at("id").get<std::string>()).at("ids"))
      side->push_back(id.get<Token>());
  }
}

void Tokenizer::Rules::read_decoder(const Json& stage) {
  const std::string type = type_of(stage);
  if (type == "ByteLevel") {
    decoders.push_back({DecodeStage::Kind::byte_level, {}, {}});
  } else if (type == "ByteFallback") {
    decoders.push_back({DecodeStage::Kind::byte_fallback, {}, {}});
    decodes_bytes = true;
  } else if (type == "Fuse") {
    decoders.push_back({DecodeStage::Kind::fuse, {}, {}});
  } else if (type == "Strip") {
    decoders.push_back({DecodeStage::Kind::strip,
                        stage.at("content").get<std::string>(),
                        {},
                        stage.at("start").get<std::size_t>(),
                        stage.at("stop").get<std::size_t>()});
  } else if (type == "Replace" && stage.at("pattern").contains("String")) {
    decoders.push_back({DecodeStage::Kind::replace, stage["pattern"]["String"].get<std::string>(),
                        stage.at("content").get<std::string>()});
  } else if (type == "Metaspace") {
    const std::string scheme =
        stage.value("prepend_scheme", stage.value("add_prefix_space", true) ? "always" : "never");
    decoders.push_back(
        {DecodeStage::Kind::metaspace, stage.at("replacement").get<std::string>(), {}, 0, 0, scheme != "never"});
  } else {
    refuse("a decoder " + type);
  }
}

}  // namespace mirror
