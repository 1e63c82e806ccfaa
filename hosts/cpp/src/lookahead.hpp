// How many passes a continuation takes, and how large they are. Pure integers.
#pragma once

#include <algorithm>
#include <vector>

namespace mirror {

// One pass, per branch: `real` rows of tokens that the cache doesn't hold yet, and `gives` tokens that
// come out, so gives - 1 stream rows follow the real ones.
struct BranchPass {
  int real, gives;
  int rows() const { return real + gives - 1; }
};

// The passes that give a branch `depth` tokens: at most tokens_per_pass[j] in pass j, the last number repeats.
inline std::vector<BranchPass> branch_passes(const std::vector<int>& tokens_per_pass, int depth) {
  std::vector<BranchPass> passes;
  for (int left = depth; left > 0; left -= passes.back().gives) {
    const int most = tokens_per_pass[std::min(passes.size(), tokens_per_pass.size() - 1)];
    passes.push_back({passes.empty() ? 1 : passes.back().gives, std::min(most, left)});
  }
  return passes;
}

// How many of a rollout's branches take part in a pass, numbered from 0: at most branches_per_pass[number], the last
// number repeats. Empty sets no limit.
inline int branches_at(std::size_t number, int branches, const std::vector<int>& branches_per_pass) {
  if (branches_per_pass.empty()) return branches;
  return std::min(branches, branches_per_pass[std::min(number, branches_per_pass.size() - 1)]);
}

// The slots that a draft's cache needs: the context, a window, and all rows of a rollout's passes.
// `most_given`: tokens that a pass of a proposal gives, at most.
inline int rollout_capacity(int max_length, int gamma, int branches, const std::vector<int>& tokens_per_pass,
                            const std::vector<int>& branches_per_pass, int most_given) {
  int rows = 0;
  std::size_t number = 0;
  for (const BranchPass& pass : branch_passes(tokens_per_pass, gamma))
    rows += branches_at(number++, branches, branches_per_pass) * pass.rows();
  const int given = std::max(*std::max_element(tokens_per_pass.begin(), tokens_per_pass.end()), most_given);
  return max_length + gamma + given + std::max(rows, 1);
}

}  // namespace mirror
