// The text of an answer as its tokens commit. Never gives half a character, nor text that could still
// become a stop string. The texts given, joined, are the decoding of all tokens, and do not depend on
// how the tokens were grouped.
#pragma once

#include <string>
#include <vector>

#include "tokenizer.hpp"

namespace mirror {

class TextStream {
 public:
  // Throws Error(request) if a stop string is empty.
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stop);

  // Takes committed tokens; returns the text that they settle. Tokens after the one that completes a
  // stop string are ignored.
  std::string push(const Tokens& tokens);

  // The text that was held back; the answer ends here. A second call returns nothing.
  std::string finish();

  bool stopped() const { return stopped_; }
  // How many pushed tokens count: all, or those up to the one that completed a stop string.
  std::size_t kept_tokens() const { return kept_tokens_; }
  // Everything that push and finish returned.
  const std::string& text() const { return text_; }

 private:
  std::string feed(Token token);
  std::string give(const std::string& decoded);
  void let_go();
  std::string filter(const std::string& text);
  std::size_t undecided(const std::string& text) const;

  const Tokenizer& tokenizer_;
  std::vector<std::string> stop_;
  Tokens tokens_;             // visible tokens since a clean boundary
  std::size_t given_ = 0;     // bytes of their decoding that were given already
  std::size_t boundary_ = 0;  // how many of them stand before the last clean boundary
  std::string held_, text_;
  bool stopped_ = false;
  std::size_t kept_tokens_ = 0;
};

}  // namespace mirror
