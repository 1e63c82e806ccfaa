// Which branches a rollout prepares, and which draft tokens stand. Pure.
#pragma once

#include <vector>

#include "records.hpp"

namespace mirror {

// The branches to roll out: per window position the best candidates, rank by rank over the sources
// (the first source first at each rank). The window's own next token is left out, since
// verification doesn't stop where it is right. `fanout` has a count per position.
// Branches come by ascending position and are distinct within one.
std::vector<Branch> choose_branches(const Tokens& window, const std::vector<Candidates>& sources,
                                    const std::vector<int>& fanout);

// The rows of branches by falling odds, as far as a fan-out tells: it gives each position the branches that are worth
// having beside all others, so the first third of one position's is about as likely as the first third of another's.
// `branches` as choose_branches returns them, `fanout` what they were chosen with.
std::vector<int> by_likelihood(const std::vector<Branch>& branches, const std::vector<int>& fanout);

// The `count` likeliest branches, in their order.
std::vector<Branch> likeliest(const std::vector<Branch>& branches, const std::vector<int>& fanout, int count);

// How many draft tokens of a window stand, and the target's token after them. `choose(i)` returns the
// target's token after x_i; it is called in order, and only while all draft tokens before stand.
template <typename Choose>
Outcome verify(const Tokens& window, Choose choose) {
  const int last = static_cast<int>(window.size()) - 1;
  for (int position = 0; position < last; ++position) {
    const Token token = choose(position);
    if (token != window[static_cast<std::size_t>(position) + 1]) return {position, token};
  }
  return {last, choose(last)};
}

}  // namespace mirror
