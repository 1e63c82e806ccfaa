// Token texts to text, stage by stage.

#include <cctype>

#include "tokenizer_rules.hpp"
#include "unicode.hpp"

namespace mirror {

bool is_byte_text(const std::string& text) {
  return text.size() == 6 && text.rfind("<0x", 0) == 0 && text[5] == '>' &&
         std::isxdigit(static_cast<unsigned char>(text[3])) && std::isxdigit(static_cast<unsigned char>(text[4]));
}

namespace {

// Neighbouring byte tokens are one group; one that isn't UTF-8 decodes to U+FFFD for each byte.
Pieces join_bytes(const Pieces& pieces) {
  Pieces result;
  std::string group;
  const auto close = [&] {
    if (group.empty()) return;
    const std::string text = lossy_utf8(group);
    if (text == group) {
      result.push_back(text);
    } else {
      for (std::size_t count = 0; count < group.size(); ++count) result.push_back("\xEF\xBF\xBD");
    }
    group.clear();
  };
  for (const std::string& piece : pieces) {
    if (is_byte_text(piece)) {
      group += static_cast<char>(std::stoi(piece.substr(3, 2), nullptr, 16));
      continue;
    }
    close();
    result.push_back(piece);
  }
  close();
  return result;
}

std::string joined(const Pieces& pieces) {
  std::string text;
  for (const std::string& piece : pieces) text += piece;
  return text;
}

// Takes at most `start` and `stop` times a text from the two ends.
std::string stripped(std::string text, const DecodeStage& stage) {
  for (std::size_t count = 0; count < stage.start && text.rfind(stage.from, 0) == 0; ++count)
    text.erase(0, stage.from.size());
  for (std::size_t count = 0; count < stage.stop && text.size() >= stage.from.size() &&
                              text.compare(text.size() - stage.from.size(), std::string::npos, stage.from) == 0;
       ++count)
    text.erase(text.size() - stage.from.size());
  return text;
}

// The bytes that a token's printable characters stand for; its own where one of them stands for none.
std::string bytes_of_text(const std::string& text, const std::unordered_map<char32_t, unsigned char>& map) {
  std::string bytes;
  for (const char32_t point : decode_utf8(text).points) {
    const auto found = map.find(point);
    if (found == map.end()) return text;
    bytes += static_cast<char>(found->second);
  }
  return bytes;
}

}  // namespace

std::string Tokenizer::Rules::decode(Pieces pieces) const {
  for (const DecodeStage& stage : decoders) {
    switch (stage.kind) {
      case DecodeStage::Kind::byte_level: {
        std::string bytes;
        for (const std::string& piece : pieces) bytes += bytes_of_text(piece, bytes_of);
        pieces = {lossy_utf8(bytes)};
        break;
      }
      case DecodeStage::Kind::byte_fallback: pieces = join_bytes(pieces); break;
      case DecodeStage::Kind::fuse: pieces = {joined(pieces)}; break;
      case DecodeStage::Kind::replace:
        for (std::string& piece : pieces) piece = replaced(piece, stage.from, stage.to);
        break;
      case DecodeStage::Kind::strip:
        for (std::string& piece : pieces) piece = stripped(piece, stage);
        break;
      case DecodeStage::Kind::metaspace:
        for (std::size_t index = 0; index < pieces.size(); ++index) {
          if (index == 0 && stage.prepended && pieces[0].rfind(stage.from, 0) == 0)
            pieces[0].erase(0, stage.from.size());
          pieces[index] = replaced(pieces[index], stage.from, " ");
        }
    }
  }
  if (!decoders.empty()) return joined(pieces);
  std::string text;  // without a decoder, tokens are joined by spaces
  for (const std::string& piece : pieces) text += (text.empty() ? "" : " ") + piece;
  return text;
}

}  // namespace mirror
