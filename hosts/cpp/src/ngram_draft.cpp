#include "ngram_draft.hpp"

#include <algorithm>

#include "candidates.hpp"

namespace mirror {

void NgramDraft::keep(int length) {
  if (static_cast<std::size_t>(length) >= read_.size()) return;
  const Tokens kept(read_.begin(), read_.begin() + length);
  read_.clear();
  ends_.clear();
  extend(kept.data(), kept.size());
}

void NgramDraft::read(const Tokens& tokens) {
  const auto span = log_.span(SpanName::draft_prefill);
  extend(tokens.data() + read_.size(), tokens.size() - read_.size());
}

Proposal NgramDraft::propose(const Tokens& tokens, int count, const std::optional<CoupledNoise>&) {
  Proposal proposal;
  {
    const auto span = log_.span(SpanName::propose);
    extend(tokens.data() + read_.size(), tokens.size() - read_.size());
    proposal.tokens = continuation(tail(), count);
  }
  proposal.spans = log_.take();
  return proposal;
}

Rollout NgramDraft::roll_out(const Tokens& tokens, const Tokens& window, int depth, Meeting& meeting,
                             const std::optional<CoupledNoise>&) {
  Rollout rollout;
  {
    const auto span = log_.span(SpanName::trunk);
    extend(tokens.data() + read_.size(), tokens.size() - read_.size());
  }
  rollout.branches = branches(window, meeting);
  {
    const auto span = log_.span(SpanName::rollout);
    for (const Branch& branch : rollout.branches) {
      Tokens line = tail();
      line.insert(line.end(), window.begin() + 1, window.begin() + 1 + branch.accepted);
      line.push_back(branch.next);
      rollout.continuations.push_back(continuation(line, depth));
    }
  }
  rollout.spans = log_.take();
  return rollout;
}

std::vector<Branch> NgramDraft::branches(const Tokens& window, Meeting& meeting) {
  std::vector<Candidates> sources;
  if (needs_draft(source_)) sources.push_back(own_candidates(window));
  if (needs_exit(source_)) {
    const auto span = log_.span(SpanName::candidate_wait);
    auto offered = meeting.wait_candidates();
    if (!offered) return {};
    sources.push_back(std::move(*offered));
  }
  return choose_branches(window, sources, fanout_);
}

// Per window position the tokens that followed before, latest first.
Candidates NgramDraft::own_candidates(const Tokens& window) const {
  const int top = *std::max_element(fanout_.begin(), fanout_.end()) + 1;
  Candidates found{Tokens(window.size() * static_cast<std::size_t>(top), -1), {}, top};
  Tokens line = tail();
  for (std::size_t position = 0; position < window.size(); ++position) {
    if (position > 0) line.push_back(window[position]);
    const auto& ends = matches(line);
    const auto row = found.ids.begin() + static_cast<std::ptrdiff_t>(position) * top;
    int count = 0;
    for (auto end = ends.rbegin(); end != ends.rend() && count < top; ++end)
      if (std::find(row, row + count, read_[*end]) == row + count) row[count++] = read_[*end];
  }
  return found;
}

Tokens NgramDraft::continuation(const Tokens& line, int count) const {
  const auto& ends = matches(line);
  if (ends.empty()) return {};
  const std::size_t first = ends.back(), last = std::min(read_.size(), first + static_cast<std::size_t>(count));
  return Tokens(read_.begin() + static_cast<std::ptrdiff_t>(first), read_.begin() + static_cast<std::ptrdiff_t>(last));
}

// Where the longest known ending of a line was followed by what.
const std::vector<std::size_t>& NgramDraft::matches(const Tokens& line) const {
  static const std::vector<std::size_t> none;
  for (std::size_t size = std::min(most_, line.size()); size > 0; --size) {
    const auto found = ends_.find(Tokens(line.end() - static_cast<std::ptrdiff_t>(size), line.end()));
    if (found != ends_.end()) return found->second;
  }
  return none;
}

Tokens NgramDraft::tail() const {
  return Tokens(read_.end() - static_cast<std::ptrdiff_t>(std::min(most_, read_.size())), read_.end());
}

void NgramDraft::extend(const Token* tokens, std::size_t count) {
  for (std::size_t next = 0; next < count; ++next) {
    const std::size_t index = read_.size();
    for (std::size_t size = 1; size <= std::min(most_, index); ++size)
      ends_[Tokens(read_.end() - static_cast<std::ptrdiff_t>(size), read_.end())].push_back(index);
    read_.push_back(tokens[next]);
  }
}

}  // namespace mirror
