// A draft without a model: what followed the same few tokens earlier in the context (prompt lookup).
#pragma once

#include <map>
#include <vector>

#include "draft.hpp"
#include "spans.hpp"

namespace mirror {

// Continues the longest recent repetition: the last `max_ngram_size` tokens, else fewer.
class NgramDraft final : public Draft {
 public:
  NgramDraft(CandidateSource source, std::vector<int> fanout, int max_ngram_size)
      : source_(source), fanout_(std::move(fanout)), most_(static_cast<std::size_t>(max_ngram_size)) {}

  void keep(int length) override;
  void see_states(int, const States&) override {}
  void read(const Tokens& tokens) override;
  Proposal propose(const Tokens& tokens, int count, const std::optional<CoupledNoise>& noise) override;
  Rollout roll_out(const Tokens& tokens, const Tokens& window, int depth, Meeting& meeting,
                   const std::optional<CoupledNoise>& noise) override;

 private:
  std::vector<Branch> branches(const Tokens& window, Meeting& meeting);
  Candidates own_candidates(const Tokens& window) const;
  Tokens continuation(const Tokens& line, int count) const;
  const std::vector<std::size_t>& matches(const Tokens& line) const;
  Tokens tail() const;
  void extend(const Token* tokens, std::size_t count);

  CandidateSource source_;
  std::vector<int> fanout_;
  std::size_t most_;
  SpanLog log_;
  Tokens read_;
  // For every n-gram of read_ that has a token after it, the indices of those tokens, ascending.
  std::map<Tokens, std::vector<std::size_t>> ends_;
};

}  // namespace mirror
