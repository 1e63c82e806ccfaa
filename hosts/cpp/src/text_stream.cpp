#include "text_stream.hpp"

#include <algorithm>

#include "error.hpp"

namespace mirror {
namespace {

const std::string replacement = "\xEF\xBF\xBD";
constexpr std::size_t window_tokens = 16;  // at least this many are decoded again before they are let go

// Without the U+FFFD at its end, which may be the beginning of a character.
std::string settled_part(std::string text) {
  while (text.size() >= replacement.size() &&
         text.compare(text.size() - replacement.size(), std::string::npos, replacement) == 0)
    text.resize(text.size() - replacement.size());
  return text;
}

}  // namespace

TextStream::TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop)
    : tokenizer_(tokenizer), stop_(std::move(stop)) {
  if (std::any_of(stop_.begin(), stop_.end(), [](const std::string& text) { return text.empty(); }))
    throw Error(ErrorKind::request, "a stop string is empty, so nothing could ever be generated; remove it");
}

std::string TextStream::push(const Tokens& tokens) {
  std::string piece;
  // One at a time: where a stop string is found must not depend on the grouping.
  for (const Token token : tokens) {
    if (stopped_) break;
    ++kept_tokens_;
    piece += filter(feed(token));
  }
  text_ += piece;
  return piece;
}

std::string TextStream::finish() {
  if (stopped_) return {};
  std::string rest = filter(give(tokenizer_.decode(tokens_)));
  rest += held_;
  held_.clear();
  text_ += rest;
  return rest;
}

std::string TextStream::feed(Token token) {
  if (!tokenizer_.shows(token)) return {};
  tokens_.push_back(token);
  if (tokenizer_.is_byte(token)) return {};
  const std::string decoded = tokenizer_.decode(tokens_);
  const std::string settled = settled_part(decoded);
  std::string fresh = give(settled);
  if (settled.size() == decoded.size()) let_go();
  return fresh;
}

std::string TextStream::give(const std::string& decoded) {
  std::string fresh = decoded.size() > given_ ? decoded.substr(given_) : std::string();
  given_ += fresh.size();
  return fresh;
}

// Forgets the tokens before the last clean boundary, when there are enough of them.
void TextStream::let_go() {
  if (boundary_ >= window_tokens) {
    const Tokens context(tokens_.begin() + static_cast<std::ptrdiff_t>(boundary_), tokens_.end());
    // A context that shows nothing, as a lone dropped space, would leave that to the next token.
    if (const std::size_t given = tokenizer_.decode(context).size(); given > 0) tokens_ = context, given_ = given;
  }
  boundary_ = tokens_.size();
}

// Passes text on until a stop string completes, holding back what may become one.
std::string TextStream::filter(const std::string& text) {
  if (stop_.empty() || text.empty()) return text;
  const std::string pending = held_ + text;
  std::size_t end = std::string::npos, start = 0;
  for (const std::string& stop : stop_) {
    const std::size_t found = pending.find(stop);
    if (found == std::string::npos) continue;
    // The one that ends first wins; of two that end together, the longer.
    const std::size_t after = found + stop.size();
    if (after < end || (after == end && found < start)) end = after, start = found;
  }
  if (end != std::string::npos) {
    stopped_ = true;
    held_.clear();
    return pending.substr(0, start);
  }
  const std::size_t kept = pending.size() - undecided(pending);
  held_ = pending.substr(kept);
  return pending.substr(0, kept);
}

// The length of the longest end of a text that some stop string begins with.
std::size_t TextStream::undecided(const std::string& text) const {
  std::size_t longest = 0;
  for (const std::string& stop : stop_)
    for (std::size_t size = std::min(text.size(), stop.size() - 1); size > longest; --size)
      if (text.compare(text.size() - size, size, stop, 0, size) == 0) {
        longest = size;
        break;
      }
  return longest;
}

}  // namespace mirror
