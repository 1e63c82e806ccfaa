// Text to token ids: added tokens, normalisation, splitting, merging.

#include <algorithm>
#include <cstdio>
#include <queue>

#include "tokenizer_rules.hpp"
#include "unicode.hpp"

namespace mirror {

std::string replaced(const std::string& text, const std::string& from, const std::string& to) {
  std::string result;
  std::size_t at = 0;
  for (std::size_t found; (found = text.find(from, at)) != std::string::npos; at = found + from.size())
    result.append(text, at, found - at).append(to);
  return result.append(text, at, std::string::npos);
}

namespace {

std::string normalized(const std::string& text, const Normalizer& normalizer) {
  switch (normalizer.kind) {
    case Normalizer::Kind::nfc: return normal_form_c(text);
    case Normalizer::Kind::prepend: return normalizer.to + text;
    default: return replaced(text, normalizer.from, normalizer.to);
  }
}

}  // namespace

// Cuts the text at added tokens, the leftmost first and the longest of those.
Tokens Tokenizer::Rules::encode(const std::string& text) const {
  Tokens ids;
  std::size_t start = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto fits = [&](const AddedToken& marker) {
      return text.compare(at, marker.content.size(), marker.content) == 0;
    };
    const auto marker = std::find_if(markers.begin(), markers.end(), fits);
    if (marker == markers.end()) {
      ++at;
      continue;
    }
    std::size_t end = at;
    while (marker->lstrip && end > start && is_white_space(static_cast<unsigned char>(text[end - 1]))) --end;
    encode_part(text.substr(start, end - start), ids);
    ids.push_back(marker->id);
    at += marker->content.size();
    while (marker->rstrip && at < text.size() && is_white_space(static_cast<unsigned char>(text[at]))) ++at;
    start = at;
  }
  encode_part(text.substr(start), ids);
  return ids;
}

void Tokenizer::Rules::encode_part(const std::string& part, Tokens& ids) const {
  if (part.empty()) return;
  std::string text = part;
  for (const Normalizer& normalizer : normalizers) text = normalized(text, normalizer);
  if (!metaspace.empty()) {
    text = replaced(text, " ", metaspace);
    if (metaspace_prepend && text.rfind(metaspace, 0) != 0) text = metaspace + text;
  }
  if (prefix_space && text[0] != ' ') text = " " + text;
  for (const std::string& piece : split(text)) {
    if (!byte_level) {
      encode_piece(piece, ids);
      continue;
    }
    std::string printable;
    for (const char byte : piece) printable += byte_texts[static_cast<unsigned char>(byte)];
    encode_piece(printable, ids);
  }
}

namespace {

bool is_numeric(char32_t point) {
  const Category category = category_of(point);
  return category_names[category][0] == 'N';
}

// The ends of the pieces of a text, by one splitter, as indices of code points.
std::vector<int> piece_ends(const std::vector<char32_t>& points, const Splitter& splitter) {
  std::vector<int> ends;
  const int count = static_cast<int>(points.size());
  if (splitter.kind == Splitter::Kind::digits) {
    for (int at = 1; at <= count; ++at) {
      const bool before = is_numeric(points[static_cast<std::size_t>(at - 1)]);
      const bool after = at < count && is_numeric(points[static_cast<std::size_t>(at)]);
      if (at == count || before != after || (before && splitter.individual)) ends.push_back(at);
    }
    return ends;
  }
  int unmatched = 0;  // where text that nothing matched begins
  for (int at = 0; at < count;) {
    const int end = splitter.pattern->match(points, at);
    if (end <= at) {
      ++at;
      continue;
    }
    if (unmatched < at) ends.push_back(at);
    ends.push_back(end);
    unmatched = at = end;
  }
  if (unmatched < count) ends.push_back(count);
  return ends;
}

Pieces split_one(const std::string& text, const Splitter& splitter) {
  const CodePoints decoded = decode_utf8(text);
  Pieces pieces;
  std::size_t start = 0;
  for (const int end : piece_ends(decoded.points, splitter)) {
    const std::size_t stop = decoded.offsets[static_cast<std::size_t>(end)];
    pieces.push_back(text.substr(start, stop - start));
    start = stop;
  }
  return pieces;
}

}  // namespace

Pieces Tokenizer::Rules::split(const std::string& text) const {
  Pieces pieces = {text};
  if (!metaspace.empty() && metaspace_split) {
    // A word and the mark before it stay together.
    pieces.clear();
    std::size_t start = 0;
    for (std::size_t at = 1; at <= text.size(); ++at)
      if (at == text.size() || text.compare(at, metaspace.size(), metaspace) == 0) {
        pieces.push_back(text.substr(start, at - start));
        start = at;
      }
  }
  for (const Splitter& splitter : splitters) {
    Pieces finer;
    for (const std::string& piece : pieces)
      for (std::string& part : split_one(piece, splitter)) finer.push_back(std::move(part));
    pieces = std::move(finer);
  }
  return pieces;
}

void Tokenizer::Rules::encode_piece(const std::string& piece, Tokens& ids) const {
  if (ignore_merges) {
    const auto whole = vocabulary.find(piece);
    if (whole != vocabulary.end()) {
      ids.push_back(whole->second);
      return;
    }
  }
  std::vector<Token> symbols = characters(piece);
  merge(symbols);
  ids.insert(ids.end(), symbols.begin(), symbols.end());
}

// One token per character; characters that the vocabulary lacks become bytes or the unknown token.
std::vector<Token> Tokenizer::Rules::characters(const std::string& piece) const {
  std::vector<Token> symbols;
  const CodePoints decoded = decode_utf8(piece);
  bool unknown_before = false;
  for (std::size_t index = 0; index < decoded.points.size(); ++index) {
    const std::string character =
        piece.substr(decoded.offsets[index], decoded.offsets[index + 1] - decoded.offsets[index]);
    const auto known = vocabulary.find(character);
    if (known != vocabulary.end()) {
      symbols.push_back(known->second);
      unknown_before = false;
      continue;
    }
    std::vector<Token> bytes;
    for (const char byte : character) {
      char name[8];
      std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned char>(byte));
      const auto found = byte_fallback ? vocabulary.find(name) : vocabulary.end();
      if (found != vocabulary.end()) bytes.push_back(found->second);
    }
    if (bytes.size() == character.size()) {
      symbols.insert(symbols.end(), bytes.begin(), bytes.end());
      unknown_before = false;
    } else if (unknown) {
      if (!(fuse_unknown && unknown_before)) symbols.push_back(*unknown);
      unknown_before = true;
    }
  }
  return symbols;
}

// Joins neighbours, the pair of lowest rank first and the leftmost of equals, until none is left.
void Tokenizer::Rules::merge(std::vector<Token>& symbols) const {
  struct Candidate {
    int rank, at;
    Token result;
    bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  const int count = static_cast<int>(symbols.size());
  std::vector<int> next(symbols.size()), before(symbols.size());
  std::priority_queue<Candidate> queue;
  const auto look = [&](int left, int right) {
    if (left < 0 || right >= count) return;
    const auto key = (static_cast<std::uint64_t>(symbols[static_cast<std::size_t>(left)]) << 32) |
                     static_cast<std::uint64_t>(symbols[static_cast<std::size_t>(right)]);
    const auto found = merges.find(key);
    if (found != merges.end()) queue.push({found->second.first, left, found->second.second});
  };
  for (int at = 0; at < count; ++at) {
    next[static_cast<std::size_t>(at)] = at + 1;
    before[static_cast<std::size_t>(at)] = at - 1;
    look(at, at + 1);
  }
  constexpr Token gone = -1;
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    const int right =
        symbols[static_cast<std::size_t>(best.at)] == gone ? count : next[static_cast<std::size_t>(best.at)];
    if (right >= count) continue;
    const auto key = (static_cast<std::uint64_t>(symbols[static_cast<std::size_t>(best.at)]) << 32) |
                     static_cast<std::uint64_t>(symbols[static_cast<std::size_t>(right)]);
    const auto still = merges.find(key);
    if (still == merges.end() || still->second.second != best.result) continue;
    symbols[static_cast<std::size_t>(best.at)] = best.result;
    symbols[static_cast<std::size_t>(right)] = gone;
    const int after = next[static_cast<std::size_t>(right)];
    next[static_cast<std::size_t>(best.at)] = after;
    if (after < count) before[static_cast<std::size_t>(after)] = best.at;
    look(before[static_cast<std::size_t>(best.at)], best.at);
    look(best.at, after);
  }
  symbols.erase(std::remove(symbols.begin(), symbols.end(), gone), symbols.end());
}

}  // namespace mirror
