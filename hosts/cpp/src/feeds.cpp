#include "feeds.hpp"

#include <algorithm>

namespace mirror {

void PassFeeds::fill_causal(const Token* tokens, int count, int past) {
  for (int row = 0; row < width; ++row) {
    const auto at = static_cast<std::size_t>(row);
    ids[at] = tokens[std::min(row, count - 1)];
    positions[at] = std::min<std::int64_t>(past + row, last_position_);
    row_visible[at] = past + row + 1;
    row_branch[at] = trunk_row;
  }
  fill_cursor(past);
}

void PassFeeds::fill_rows(const std::vector<BranchRow>& rows, int past) {
  for (std::size_t at = 0; at < ids.size(); ++at) {
    const bool padding = at >= rows.size();
    const BranchRow& row = rows[padding ? 0 : at];
    ids[at] = padding ? rows.back().token : row.token;
    positions[at] = std::min(row.position, last_position_);
    row_visible[at] = row.visible;
    row_branch[at] = padding ? trunk_row : row.branch;
  }
  fill_cursor(past);
}

void PassFeeds::want_rows(int first, int count) {
  // Rows past the wanted ones repeat the last: sessions of fixed sizes compute them too.
  for (int index = 0; index < width; ++index)
    logit_rows[static_cast<std::size_t>(index)] = first + std::min(index, count - 1);
}

void PassFeeds::fill_cursor(int past) {
  past_length = past;
  seqlens_k = past + width - 1;
  total_sequence_length = past + width;
}

int fit_width(const std::vector<int>& widths, int rows) {
  if (widths.empty()) return rows;
  const auto found = std::find_if(widths.begin(), widths.end(), [rows](int width) { return width >= rows; });
  return found == widths.end() ? widths.back() : *found;
}

Chunk chunk_width(const std::vector<int>& widths, int rows, int room) {
  int width = fit_width(widths, rows);
  for (auto narrower = widths.rbegin(); narrower != widths.rend(); ++narrower) {
    if (*narrower >= width) continue;
    const bool mostly_padding = 2 * rows <= width && rows <= 2 * *narrower;
    if (width <= room && !mostly_padding) break;
    width = *narrower;
  }
  return {std::min(rows, width), width};
}

}  // namespace mirror
