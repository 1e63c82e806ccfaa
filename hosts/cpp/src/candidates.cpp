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

std::vector<int> by_likelihood(const std::vector<Branch>& branches, const std::vector<int>& fanout) {
  std::vector<int> rows;
  std::vector<double> parts;  // of its position's fan-out, up to each branch
  int rank = 0;
  for (std::size_t row = 0; row < branches.size(); ++row) {
    rank = row > 0 && branches[row].accepted == branches[row - 1].accepted ? rank + 1 : 1;
    parts.push_back(static_cast<double>(rank) / fanout[static_cast<std::size_t>(branches[row].accepted)]);
    rows.push_back(static_cast<int>(row));
  }
  const auto likelier = [&parts](int a, int b) {
    return parts[static_cast<std::size_t>(a)] < parts[static_cast<std::size_t>(b)];
  };
  std::stable_sort(rows.begin(), rows.end(), likelier);
  return rows;
}

std::vector<Branch> likeliest(const std::vector<Branch>& branches, const std::vector<int>& fanout, int count) {
  if (static_cast<int>(branches.size()) <= count) return branches;
  std::vector<int> rows = by_likelihood(branches, fanout);
  rows.resize(static_cast<std::size_t>(count));
  std::sort(rows.begin(), rows.end());
  std::vector<Branch> kept;
  for (const int row : rows) kept.push_back(branches[static_cast<std::size_t>(row)]);
  return kept;
}

}  // namespace mirror
