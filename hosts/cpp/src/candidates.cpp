#include "candidates.hpp"

#include <algorithm>

namespace mirror {
namespace {

// The candidates of one position by rank: first of each source, second of each, ...
Tokens interleaved(const std::vector<Candidates>& sources, int position) {
  int top = 0;
  for (const Candidates& source : sources) top = std::max(top, source.top);
  Tokens merged;
  for (int rank = 0; rank < top; ++rank)
    for (const Candidates& source : sources)
      if (rank < source.top) merged.push_back(source.ids[static_cast<std::size_t>(position * source.top + rank)]);
  return merged;
}

}  // namespace

std::vector<Branch> choose_branches(const Tokens& window, const std::vector<Candidates>& sources,
                                    const std::vector<int>& fanout) {
  std::vector<Branch> branches;
  const int width = static_cast<int>(window.size());
  for (int position = 0; position < width; ++position) {
    const std::size_t first = branches.size();
    const auto most = static_cast<std::size_t>(fanout[static_cast<std::size_t>(position)]);
    const Token own = position + 1 < width ? window[static_cast<std::size_t>(position) + 1] : -1;
    for (const Token token : interleaved(sources, position)) {
      if (branches.size() - first >= most) break;
      const auto same = [token](const Branch& branch) { return branch.next == token; };
      const bool known = std::any_of(branches.begin() + static_cast<std::ptrdiff_t>(first), branches.end(), same);
      if (token >= 0 && token != own && !known) branches.push_back({position, token});
    }
  }
  return branches;
}

}  // namespace mirror
