// Counts and times of one answer, computed from its rounds. Pure.
#pragma once

#include <optional>
#include <vector>

#include "records.hpp"

namespace mirror {

// Named and meant as in the Python package; absent where there is nothing to divide by.
struct Statistics {
  int prompt_tokens = 0, reused_prompt_tokens = 0, generated_tokens = 0, rounds = 0;
  int draft_tokens_proposed = 0, draft_tokens_accepted = 0, target_forward_passes = 0, redrafts = 0;
  std::optional<double> acceptance_rate, tokens_per_round, reuse_rate, branches_per_round, ttft_s, decode_tokens_per_s,
      draft_hidden;
  double round_ms = 0, prefix_ms = 0, exit_head_ms = 0, suffix_ms = 0, trunk_ms = 0, rollout_ms = 0, propose_ms = 0,
         candidate_wait_ms = 0, rollout_wait_ms = 0, redraft_ms = 0, host_ms = 0;
};

// What the statistics need of the time before the first round.
struct PromptFacts {
  int tokens = 0, reused_tokens = 0, passes = 0, first_tokens = 0;
  std::optional<double> ttft_s;
};

Statistics summarise(const PromptFacts& prompt, const std::vector<Round>& rounds);

}  // namespace mirror
