// tokenizer.json to token ids and back, for byte-pair encodings. What a file asks for beyond that is
// refused by name when it is read; token-id calls work with any model.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "pattern.hpp"
#include "records.hpp"

namespace mirror {

class Tokenizer {
 public:
  // Throws Error(request) if the folder has no tokenizer.json, Error(bundle) if it can't be read here.
  explicit Tokenizer(const std::filesystem::path& folder);
  ~Tokenizer();

  // The token ids of a UTF-8 text. `add_special_tokens`: those that the tokenizer puts around it; a
  // prompt in chat format brings its own. Throws Error(request) if the text isn't UTF-8.
  Tokens encode(const std::string& text, bool add_special_tokens) const;

  // The text of token ids, without special tokens and ids that the tokenizer doesn't know.
  std::string decode(const Tokens& tokens) const;

  // Whether a token can be part of a text: it isn't special, and the tokenizer knows it.
  bool shows(Token token) const;

  // Whether a token is one byte of a group that is decoded as a whole (<0xE4> of byte fallback).
  bool is_byte(Token token) const;

 private:
  struct Rules;
  std::unique_ptr<const Rules> rules_;
};

}  // namespace mirror
