// The regular expressions of tokenizer.json files: a backtracking matcher over code points for the
// part of the syntax that they use. What it doesn't know it refuses when it is compiled.
#pragma once

#include <memory>
#include <string>
#include <vector>

namespace mirror {

class Pattern {
 public:
  // Throws Error(bundle) at syntax that it doesn't know.
  explicit Pattern(const std::string& source);
  ~Pattern();
  Pattern(Pattern&&) noexcept;

  // The end of the match that begins at `at`, or -1.
  int match(const std::vector<char32_t>& text, int at) const;

  struct Node;

 private:
  std::unique_ptr<Node> root_;
};

}  // namespace mirror
