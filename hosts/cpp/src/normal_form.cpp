// Unicode normal form C (UAX 15): decompose, order by combining class, compose.

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <unordered_map>

#include "unicode.hpp"

namespace mirror {
namespace {

struct Decomposition {
  char32_t composed, first, second;  // second 0: a singleton, which never composes
  bool composes;
};

constexpr Decomposition decompositions[] = {
#include "unicode_canonical.inc"
};

struct CombiningRun {
  char32_t first, last;
  std::uint8_t value;
};

constexpr CombiningRun combining_runs[] = {
#include "unicode_combining.inc"
};

// Hangul syllables are computed: leading consonants, vowels, trailing consonants.
constexpr char32_t syllable = 0xAC00, leading = 0x1100, vowel = 0x1161, trailing = 0x11A7;
constexpr char32_t vowels = 21, trailings = 28, syllables = 11172, leadings = 19;

std::uint8_t combining_class(char32_t point) {
  const auto after = std::upper_bound(std::begin(combining_runs), std::end(combining_runs), point,
                                      [](char32_t wanted, const CombiningRun& run) { return wanted < run.first; });
  if (after == std::begin(combining_runs)) return 0;
  const CombiningRun& run = *std::prev(after);
  return point <= run.last ? run.value : 0;
}

void decompose(char32_t point, std::vector<char32_t>& out) {
  if (point >= syllable && point < syllable + syllables) {
    const char32_t index = point - syllable;
    out.push_back(leading + index / (vowels * trailings));
    out.push_back(vowel + index % (vowels * trailings) / trailings);
    if (index % trailings != 0) out.push_back(trailing + index % trailings);
    return;
  }
  const auto found =
      std::lower_bound(std::begin(decompositions), std::end(decompositions), point,
                       [](const Decomposition& item, char32_t wanted) { return item.composed < wanted; });
  if (found == std::end(decompositions) || found->composed != point) {
    out.push_back(point);
    return;
  }
  decompose(found->first, out);
  if (found->second != 0) out.push_back(found->second);
}

const std::unordered_map<std::uint64_t, char32_t>& compositions() {
  static const auto map = [] {
    std::unordered_map<std::uint64_t, char32_t> made;
    for (const Decomposition& item : decompositions)
      if (item.composes) made[(std::uint64_t{item.first} << 32) | item.second] = item.composed;
    return made;
  }();
  return map;
}

// The composition of two characters, 0 if there is none.
char32_t composed(char32_t first, char32_t second) {
  if (first >= leading && first < leading + leadings && second >= vowel && second < vowel + vowels)
    return syllable + ((first - leading) * vowels + (second - vowel)) * trailings;
  const bool open_syllable = first >= syllable && first < syllable + syllables && (first - syllable) % trailings == 0;
  if (open_syllable && second > trailing && second < trailing + trailings) return first + (second - trailing);
  const auto found = compositions().find((std::uint64_t{first} << 32) | second);
  return found == compositions().end() ? 0 : found->second;
}

// Orders each run of combining characters by class, keeping the order of equals.
void order(std::vector<char32_t>& points) {
  for (auto start = points.begin(); start != points.end();) {
    const auto is_starter = [](char32_t point) { return combining_class(point) == 0; };
    start = std::find_if_not(start, points.end(), is_starter);
    const auto end = std::find_if(start, points.end(), is_starter);
    std::stable_sort(start, end, [](char32_t a, char32_t b) { return combining_class(a) < combining_class(b); });
    start = end;
  }
}

void compose(std::vector<char32_t>& points) {
  std::vector<char32_t> out;
  std::size_t starter = SIZE_MAX;
  std::uint8_t last = 0;  // the class of the character before, since the starter
  for (const char32_t point : points) {
    const std::uint8_t value = combining_class(point);
    const bool adjacent = starter != SIZE_MAX && starter + 1 == out.size();
    if (starter != SIZE_MAX && (adjacent || last < value)) {
      if (const char32_t whole = composed(out[starter], point)) {
        out[starter] = whole;
        continue;
      }
    }
    if (value == 0) starter = out.size();
    last = value;
    out.push_back(point);
  }
  points = std::move(out);
}

}  // namespace

std::string normal_form_c(const std::string& text) {
  const std::vector<char32_t> given = decode_utf8(text).points;
  // Nothing below U+0300 decomposes or combines in a way that this form would change.
  if (std::all_of(given.begin(), given.end(), [](char32_t point) { return point < 0x300; })) return text;
  std::vector<char32_t> points;
  for (const char32_t point : given) decompose(point, points);
  order(points);
  compose(points);
  std::string result;
  for (const char32_t point : points) append_utf8(result, point);
  return result;
}

}  // namespace mirror
