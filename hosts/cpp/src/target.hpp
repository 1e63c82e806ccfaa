// The target on its devices: three segments, two caches, one pass at a time.
#pragma once

#include <map>
#include <memory>
#include <optional>

#include "device.hpp"
#include "pass_pool.hpp"
#include "records.hpp"

namespace mirror {

struct TargetSegments {
  std::unique_ptr<Segment> prefix, exit_head, suffix;
  // Whether the exit layer's state goes from one device to another.
  bool hidden_on_host = false;
};

struct TargetShape {
  int capacity, max_positions, vocab_size;
  std::optional<int> pinned_width;  // the width of every pass but prefill's, and of its logits
  std::size_t state_bytes;          // of one row of the exit layer's state
};

// Runs passes over tokens; keeps no count of them (the sequence does).
class Target {
 public:
  Target(TargetSegments segments, const TargetShape& shape);

  // Runs the layers below the exit over a window; writes slots past... The pass stays open for the
  // exit head and the suffix until the next one.
  void run_prefix(const Token* tokens, int count, int past);
  Candidates run_exit_head();
  // Returns the logits of each row of the pass, [rows, vocab]; valid until the next pass.
  const float* run_suffix();
  int vocab_size() const { return shape_.vocab_size; }
  // A copy of the open pass's exit states, its real rows alone. Host memory only.
  States exit_states() const;

  struct Prefilled {
    int rows;
    const float* logits;  // of the last token if that was all, else null
  };
  // Runs one chunk of a prompt, of at most `chunk` rows, after `past` slots.
  Prefilled prefill(const Token* tokens, int count, int past, int chunk);

 private:
  struct Pass {
    Pass(int width, int max_positions) : feeds(width, max_positions, no_slots()) {}
    static SlotBranches no_slots() { return std::make_shared<std::vector<std::int32_t>>(); }
    PassFeeds feeds;
    std::unique_ptr<BoundPass> prefix, exit_head;
    std::map<int, std::unique_ptr<BoundPass>> suffix;  // by wanted rows
  };

  void open(const Token* tokens, int count, int past, int width);
  const float* suffix(int first, int rows);

  TargetSegments segments_;
  TargetShape shape_;
  std::vector<int> widths_;  // that prefix and suffix both take; empty if any
  std::shared_ptr<KVCache> prefix_cache_, suffix_cache_;
  PassPool<Pass> pool_;
  Pass* pass_ = nullptr;
  int past_ = 0, rows_ = 0;
};

}  // namespace mirror
