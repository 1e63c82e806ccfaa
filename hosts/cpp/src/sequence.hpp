// The committed tokens of one context, and how many of them the target's cache holds.
#pragma once

#include <algorithm>
#include <string>

#include "error.hpp"
#include "records.hpp"

namespace mirror {

// Invariant: 0 <= cached <= length <= max_length; between rounds cached == length - 1, since the last
// token is the first of the next window.
class Sequence {
 public:
  explicit Sequence(int max_length) : max_length_(max_length) {}

  int length() const { return static_cast<int>(tokens_.size()); }
  const Tokens& tokens() const { return tokens_; }
  int room() const { return max_length_ - length(); }

  // Replaces the tokens by a prompt; returns how many of its first ones the caches may keep.
  // Throws Error(capacity) if no token more would fit.
  int begin(const Tokens& prompt, bool reuse) {
    if (static_cast<int>(prompt.size()) >= max_length_)
      throw Error(
          ErrorKind::capacity,
          "the prompt has " + std::to_string(prompt.size()) + " tokens and the cache holds " +
              std::to_string(max_length_) +
              ", of which one is for the answer; shorten the prompt or load the bundle with a larger max_length");
    // The prompt's last token is always run again, for its logits.
    const int most = reuse ? std::min({cached, length(), static_cast<int>(prompt.size()) - 1}) : 0;
    const auto differs = std::mismatch(tokens_.begin(), tokens_.begin() + most, prompt.begin());
    cached = static_cast<int>(differs.first - tokens_.begin());
    tokens_ = prompt;
    return cached;
  }

  void append(const Tokens& tokens) { tokens_.insert(tokens_.end(), tokens.begin(), tokens.end()); }

  // Forgets cache rows past the last token but one, as an ending in mid-window leaves them.
  void settle() { cached = std::min(cached, std::max(length() - 1, 0)); }

  int cached = 0;

 private:
  int max_length_;
  Tokens tokens_;
};

}  // namespace mirror
