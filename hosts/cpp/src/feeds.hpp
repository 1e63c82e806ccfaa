// The catalogue inputs of a pass, computed from a cursor. Buffers are allocated once per width and
// stay put, so that sessions bind them once. Integers only; see docs/bundle.md.
#pragma once

#include <any>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "records.hpp"

namespace mirror {

constexpr std::int32_t no_branch = -1;  // in slot_branch: a slot of the trunk, or an empty one
constexpr std::int32_t trunk_row = -2;  // in row_branch: a row that sees no branch

// One row of a pass.
struct BranchRow {
  Token token;
  std::int64_t position;
  std::int32_t visible;  // trunk slots that it sees
  std::int32_t branch;   // trunk_row for none
  int start;             // the position of its branch's first token, -1 for a row of the trunk
};

// What a pass that was launched on a device's stream gives: an address there, int64 [rows].
struct LaunchedIds {
  const void* stream;
  const void* address;
};

class Mark;

// A pass's token_ids on their way to the host, int64 [rows].
class SentIds {
 public:
  virtual ~SentIds() = default;
  virtual const std::int64_t* wait() = 0;
  // Where in pinned memory they will lie, for as long as this is held, and what lies behind their copy; null where they
  // have to be waited for.
  virtual const std::int64_t* place() const { return nullptr; }
  virtual Mark* mark() { return nullptr; }
};

// Ids that the host doesn't know: the `count` ids of the next pass from `place` + g * stride on are the next that an
// earlier one gives, from `first` on, for each group g.
struct FollowOn {
  LaunchedIds given;              // where they are, for a segment of the same stream
  std::shared_ptr<SentIds> sent;  // or, of one group, on their way from any stream; with a place, and held until the
                                  // next pass has ended
  int first, place, groups, count, stride;
};

using SlotBranches = std::shared_ptr<std::vector<std::int32_t>>;

// The inputs of one width, refilled by every pass.
class PassFeeds {
 public:
  PassFeeds(int width, int max_positions, SlotBranches slot_branch)
      : width(width),
        ids(static_cast<std::size_t>(width)),
        positions(ids.size()),
        logit_rows(ids.size()),
        row_visible(ids.size()),
        row_branch(ids.size(), trunk_row),
        feature_rows(ids.size()),
        slot_branch(std::move(slot_branch)),
        last_position_(max_positions - 1) {}

  // Fills for tokens that follow `past` slots in one line. Rows from `count` on are padding: they
  // stand after the real rows, where no real row sees them, and their slots are written again before
  // anything reads them.
  void fill_causal(const Token* tokens, int count, int past);

  // Fills for rows of any branches, appended after `past` slots. Padding rows carry no branch.
  void fill_rows(const std::vector<BranchRow>& rows, int past);

  // The pass's wanted rows: first..first + count - 1.
  void want_rows(int first, int count);

  const int width;
  std::vector<std::int64_t> ids, positions, logit_rows;
  std::int32_t seqlens_k = 0, total_sequence_length = 0, past_length = 0;
  std::vector<std::int32_t> row_visible, row_branch;
  std::vector<float> feature_rows;
  std::vector<std::byte> features;  // [1, width, hidden of the target]; sized by who fills it
  SlotBranches slot_branch;
  // Whether the host adds a draw's noise to the pass's candidates: it guesses the better the more it gets.
  bool drawn = false;
  // Ids of the next pass that its device takes from earlier ones; only for a segment with a stream, and once.
  std::vector<FollowOn> follow;
  // The exit layer's state: made by the session that writes it, bound by those that read it.
  std::any hidden_states;
  // Whether it must be in host memory, since writer and readers are on different devices.
  bool hidden_on_host = false;

 private:
  void fill_cursor(int past);

  std::int64_t last_position_;
};

// The least of some widths that holds `rows`; the widest if none does. No widths: any runs.
int fit_width(const std::vector<int>& widths, int rows);

struct Chunk {
  int rows, width;
};

// The next pass over some waiting rows. A pass that would be mostly padding gives way to two narrower
// ones, and so does one whose padding would run past the `room` slots that the cache still has.
Chunk chunk_width(const std::vector<int>& widths, int rows, int room);

}  // namespace mirror
