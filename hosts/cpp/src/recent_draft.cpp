#include "recent_draft.hpp"

#include <algorithm>

namespace mirror {

void RecentDraft::keep(int length) { inner_->keep(std::max(length - skipped_, 0)); }

void RecentDraft::read(const Tokens& tokens) { inner_->read(recent(tokens)); }

Proposal RecentDraft::propose(const Tokens& tokens, int count, const std::optional<CoupledNoise>& noise) {
  const Tokens end = recent(tokens);
  return inner_->propose(end, count, of_recent(noise));
}

Rollout RecentDraft::roll_out(const Tokens& tokens, const Tokens& window, int depth, Meeting& meeting,
                              const std::optional<CoupledNoise>& noise) {
  const Tokens end = recent(tokens);
  return inner_->roll_out(end, window, depth, meeting, of_recent(noise));
}

// What the draft is to see of a context; it forgets what it has read where that begins anew.
Tokens RecentDraft::recent(const Tokens& tokens) {
  const int size = static_cast<int>(tokens.size()), count = size - skipped_, half = limit_ / 2;
  if (count < std::min(half, size) || count > limit_) {
    skipped_ = size > limit_ ? size - half : 0;
    inner_->keep(0);
  }
  return Tokens(tokens.begin() + skipped_, tokens.end());
}

// The noise by the draft's own positions.
std::optional<CoupledNoise> RecentDraft::of_recent(std::optional<CoupledNoise> noise) const {
  if (noise) noise->skipped = skipped_;
  return noise;
}

}  // namespace mirror
