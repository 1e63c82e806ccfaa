// What a tokenizer.json says, in the form that encoding and decoding want.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "json_reader.hpp"
#include "tokenizer.hpp"

namespace mirror {

struct Normalizer {
  enum class Kind { replace, prepend, nfc } kind;
  std::string from, to;
};

// One stage of splitting a text into the pieces that are encoded each for itself.
struct Splitter {
  enum class Kind { pattern, digits } kind = Kind::pattern;
  std::optional<Pattern> pattern;
  std::string behavior = "Isolated";
  bool invert = false, individual = false;
};

struct AddedToken {
  Token id;
  std::string content;
  bool lstrip, rstrip;
};

struct DecodeStage {
  enum class Kind { byte_level, replace, byte_fallback, fuse, strip, metaspace } kind;
  std::string from, to;
  std::size_t start = 0, stop = 0;
  bool prepended = false;
};

using Pieces = std::vector<std::string>;

// A text with every `from` replaced.
std::string replaced(const std::string& text, const std::string& from, const std::string& to);

// Whether a token's text is one byte of byte fallback, as <0xE4>.
bool is_byte_text(const std::string& text);

struct Tokenizer::Rules {
  std::unordered_map<std::string, Token> vocabulary;
  std::unordered_map<Token, std::string> texts;
  std::unordered_map<Token, bool> added;                            // added tokens: whether special
  std::vector<AddedToken> markers;                                  // longest first
  std::unordered_map<std::uint64_t, std::pair<int, Token>> merges;  // of two ids: rank and result
  std::vector<Normalizer> normalizers;
  std::vector<Splitter> splitters;
  std::vector<DecodeStage> decoders;
  Tokens before, after;  // special tokens around a text
  std::optional<Token> unknown;
  bool fuse_unknown = false, byte_fallback = false, ignore_merges = false, byte_level = false, prefix_space = false;
  bool decodes_bytes = false;
  std::string metaspace;  // replaces spaces; empty for none
  bool metaspace_split = false, metaspace_prepend = false;
  std::array<std::string, 256> byte_texts;
  std::unordered_map<char32_t, unsigned char> bytes_of;

  explicit Rules(const Json& file);

  void read_model(const Json& model);
  void read_added(const Json& added_tokens);
  void read_normalizer(const Json& stage);
  void read_splitter(const Json& stage);
  void read_processor(const Json& stage);
  void read_decoder(const Json& stage);

  Tokens encode(const std::string& text) const;
  void encode_part(const std::string& text, Tokens& ids) const;
  void encode_piece(const std::string& piece, Tokens& ids) const;
  std::vector<Token> characters(const std::string& piece) const;
  void merge(std::vector<Token>& symbols) const;
  Pieces split(const std::string& text) const;
  std::string decode(Pieces pieces) const;
};

}  // namespace mirror
