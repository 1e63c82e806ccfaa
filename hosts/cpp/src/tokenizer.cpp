#include "tokenizer.hpp"

#include <cctype>
#include <fstream>

#include "error.hpp"
#include "tokenizer_rules.hpp"
#include "unicode.hpp"

namespace mirror {

Tokenizer::Tokenizer(const std::filesystem::path& folder) {
  const auto path = folder / "tokenizer.json";
  std::error_code code;
  if (!std::filesystem::is_regular_file(path, code))
    throw Error(ErrorKind::request,
                folder.string() +
                    " has no tokenizer.json, so it takes no text; use token ids, or export it again from a "
                    "checkpoint with a tokenizer");
  std::ifstream stream(path, std::ios::binary);
  try {
    rules_ = std::make_unique<const Rules>(Json::parse(stream));
  } catch (const Error&) {
    throw;
  } catch (const std::exception& error) {
    throw Error(ErrorKind::bundle,
                path.string() + " is not a readable tokenizer (" + error.what() + "); export the bundle again");
  }
}

Tokenizer::~Tokenizer() = default;

Tokens Tokenizer::encode(const std::string& text, bool add_special_tokens) const {
  decode_utf8(text);
  Tokens ids = rules_->encode(text);
  if (!add_special_tokens) return ids;
  ids.insert(ids.begin(), rules_->before.begin(), rules_->before.end());
  ids.insert(ids.end(), rules_->after.begin(), rules_->after.end());
  return ids;
}

std::string Tokenizer::decode(const Tokens& tokens) const {
  Pieces pieces;
  for (const Token token : tokens)
    if (shows(token)) pieces.push_back(rules_->texts.at(token));
  return rules_->decode(std::move(pieces));
}

bool Tokenizer::shows(Token token) const {
  const auto added = rules_->added.find(token);
  if (added != rules_->added.end()) return !added->second;
  return rules_->texts.count(token) > 0;
}

bool Tokenizer::is_byte(Token token) const {
  if (!rules_->decodes_bytes) return false;
  const auto text = rules_->texts.find(token);
  return text != rules_->texts.end() && is_byte_text(text->second);
}

}  // namespace mirror
