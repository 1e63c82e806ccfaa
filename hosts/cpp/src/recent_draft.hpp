// A draft that reads the end of a long context only. What a draft reads decides how often it is right, never what
// comes out; and what it attends to costs time in every pass, once for each branch.
#pragma once

#include "draft.hpp"

namespace mirror {

// Gives a draft the last tokens of every context, at most `limit` and, of a longer one, at least half as many. It
// counts positions from the first of these; only noise has absolute ones. Not for drafts that the target's states
// feed, which are not kept here.
class RecentDraft final : public Draft {
 public:
  RecentDraft(std::unique_ptr<Draft> inner, int limit) : inner_(std::move(inner)), limit_(limit) {}

  void keep(int length) override;
  void see_states(int, const States&) override {}
  void read(const Tokens& tokens) override;
  Proposal propose(const Tokens& tokens, int count, const std::optional<CoupledNoise>& noise) override;
  Rollout roll_out(const Tokens& tokens, const Tokens& window, int depth, Meeting& meeting,
                   const std::optional<CoupledNoise>& noise) override;

 private:
  Tokens recent(const Tokens& tokens);
  std::optional<CoupledNoise> of_recent(std::optional<CoupledNoise> noise) const;

  std::unique_ptr<Draft> inner_;
  int limit_;
  int skipped_ = 0;  // tokens before the first that the draft has read
};

}  // namespace mirror
