// What tokenizers ask of Unicode: UTF-8, and the general category of a character.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mirror {

// General categories, two letters each, in the order of `category_names`.
using Category = std::uint8_t;

// The category of a code point, as an index into `category_names`.
Category category_of(char32_t point);
extern const char* const category_names[30];

inline bool is_white_space(char32_t c) {
  return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// A text as code points, with the byte offset of each and of the end.
struct CodePoints {
  std::vector<char32_t> points;
  std::vector<std::size_t> offsets;
};

// Throws Error(request) if the text isn't UTF-8.
CodePoints decode_utf8(const std::string& text);

void append_utf8(std::string& text, char32_t point);

// Bytes as text: what isn't UTF-8 becomes U+FFFD, one for each maximal part of a character.
std::string lossy_utf8(const std::string& bytes);

// A text in normal form C. What isn't UTF-8 must have been refused before.
std::string normal_form_c(const std::string& text);

}  // namespace mirror
