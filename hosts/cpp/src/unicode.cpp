#include "unicode.hpp"

#include <algorithm>
#include <iterator>

#include "error.hpp"

namespace mirror {
namespace {

struct CategoryRun {
  std::uint32_t first : 24;
  std::uint32_t category : 8;
};

// Runs of equal category over all code points, ascending; made by unicode_table.py.
constexpr CategoryRun category_runs[] = {
#include "unicode_table.inc"
};

// How many bytes at `at` make a character: its length, or minus the length of the part that is broken.
int character_at(const std::string& text, std::size_t at, char32_t& point) {
  const auto byte = [&](std::size_t offset) {
    return at + offset < text.size() ? static_cast<unsigned char>(text[at + offset]) : 0u;
  };
  const unsigned lead = byte(0);
  if (lead < 0x80) return point = lead, 1;
  const int length = lead >= 0xC2 && lead <= 0xDF   ? 2
                     : lead >= 0xE0 && lead <= 0xEF ? 3
                     : lead >= 0xF0 && lead <= 0xF4 ? 4
                                                    : 0;
  if (length == 0) return -1;
  const unsigned least = lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
  const unsigned most = lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
  point = lead & (0xFFu >> (length + 1));
  for (int index = 1; index < length; ++index) {
    const unsigned next = byte(static_cast<std::size_t>(index));
    if (next < (index == 1 ? least : 0x80u) || next > (index == 1 ? most : 0xBFu)) return -index;
    point = (point << 6) | (next & 0x3F);
  }
  return length;
}

}  // namespace

const char* const category_names[30] = {"Cn", "Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd",
                                        "Nl", "No", "Pc", "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "Sm",
                                        "Sc", "Sk", "So", "Zs", "Zl", "Zp", "Cc", "Cf", "Co", "Cs"};

Category category_of(char32_t point) {
  const auto after = std::upper_bound(std::begin(category_runs), std::end(category_runs), point,
                                      [](char32_t wanted, const CategoryRun& run) { return wanted < run.first; });
  return static_cast<Category>(std::prev(after)->category);
}

CodePoints decode_utf8(const std::string& text) {
  CodePoints result;
  for (std::size_t at = 0; at < text.size();) {
    char32_t point = 0;
    const int length = character_at(text, at, point);
    if (length < 0)
      throw Error(ErrorKind::request, "the text is not valid UTF-8 at byte " + std::to_string(at) + "; pass UTF-8");
    result.points.push_back(point);
    result.offsets.push_back(at);
    at += static_cast<std::size_t>(length);
  }
  result.offsets.push_back(text.size());
  return result;
}

void append_utf8(std::string& text, char32_t point) {
  const auto add = [&text](char32_t byte) { text += static_cast<char>(byte); };
  if (point < 0x80) {
    add(point);
  } else if (point < 0x800) {
    add(0xC0 | (point >> 6)), add(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    add(0xE0 | (point >> 12)), add(0x80 | ((point >> 6) & 0x3F)), add(0x80 | (point & 0x3F));
  } else {
    add(0xF0 | (point >> 18)), add(0x80 | ((point >> 12) & 0x3F)), add(0x80 | ((point >> 6) & 0x3F)),
        add(0x80 | (point & 0x3F));
  }
}

std::string lossy_utf8(const std::string& bytes) {
  std::string text;
  for (std::size_t at = 0; at < bytes.size();) {
    char32_t point = 0;
    const int length = character_at(bytes, at, point);
    if (length > 0)
      text.append(bytes, at, static_cast<std::size_t>(length));
    else
      text += "\xEF\xBF\xBD";
    at += static_cast<std::size_t>(std::abs(length));
  }
  return text;
}

}  // namespace mirror
