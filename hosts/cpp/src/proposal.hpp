// What a draft proposes to follow the committed tokens.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "feeds.hpp"
#include "records.hpp"

namespace mirror {

// Tokens, or what launched passes are making still: the target's device may take those in its own order of work, so
// that nothing stands still while the host learns of them.
struct Proposal {
  struct Part {
    std::shared_ptr<SentIds> sent;
    int gives;
  };

  Tokens tokens;
  std::vector<Span> spans;
  std::vector<Part> coming;   // each token is one that the target knows
  Clock::time_point start{};  // of the first of these passes

  // How many tokens there are, or will be.
  std::size_t size() const {
    if (!tokens.empty()) return tokens.size();
    std::size_t count = 0;
    for (const Part& part : coming) count += static_cast<std::size_t>(part.gives);
    return count;
  }

  // Waits for the tokens that are coming.
  void read() {
    Tokens found;
    for (const Part& part : coming) {
      const Token* next = part.sent->wait();
      found.insert(found.end(), next, next + part.gives);
    }
    tokens = std::move(found);
    spans.push_back({SpanName::propose, start, Clock::now()});
  }
};

}  // namespace mirror
