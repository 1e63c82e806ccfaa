// The target on its devices: three segments, two caches, one pass at a time.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "device.hpp"
#include "pass_pool.hpp"
#include "proposal.hpp"
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

// What the target says after each wanted row of a pass, read from its device as far as someone asks. Valid until the
// target's next pass; of a pass that the next one has followed already, only the likeliest tokens are left.
class RowLogits {
 public:
  RowLogits(BoundPass& pass, int vocab_size) : pass_(&pass), vocab_size_(vocab_size) {}
  RowLogits(std::shared_ptr<SentIds> sent, int vocab_size) : sent_(std::move(sent)), vocab_size_(vocab_size) {}
  // Whether `row` and `at` may be asked.
  bool has_rows() const { return pass_ != nullptr; }
  // [vocab]
  const float* row(int index) const { return pass_->logits(index); }
  float at(int index, Token token) const { return pass_->logit(index, token); }
  // The row's likeliest token, the first of equals; nothing where the graph doesn't tell, or compared what is no
  // number.
  std::optional<Token> likeliest(int index) const {
    const std::int64_t* ids = sent_ ? sent_->wait() : pass_->outputs().token_ids;
    if (ids == nullptr || ids[index] < 0 || ids[index] >= vocab_size_) return std::nullopt;
    return ids[index];
  }

 private:
  BoundPass* pass_ = nullptr;
  std::shared_ptr<SentIds> sent_;
  int vocab_size_;
};

// Runs passes over tokens; keeps no count of them (the sequence does).
class Target {
 public:
  Target(TargetSegments segments, const TargetShape& shape);

  // Runs the layers below the exit over a window; writes slots past... The pass stays open for the
  // exit head and the suffix until the next one.
  void run_prefix(const Token* tokens, int count, int past) { open_window(tokens, count, past, {}); }
  // The same over a window that a draft's device is making still; where its tokens will be, `tokens` may hold any.
  void run_prefix(const Token* tokens, int count, int past, const Proposal& coming);
  void run_exit_head();
  void run_suffix();
  // Whether these only launch, so that one needs no other's end to follow it.
  bool launches() const { return segments_.prefix->launches() && segments_.suffix->launches(); }

  // What the open pass gave so far; these wait for it.
  Candidates exit_candidates();
  RowLogits logits();
  // Launches the pass after the open one, over the likeliest token after its first row, and waits for that token only
  // then; opens that pass and returns the last one's logits, of which no rows are left. Nothing, and nothing is
  // launched, where the host has to know the token first. `past`: the slots filled before it.
  std::optional<RowLogits> run_ahead(int past);
  // A copy of the exit states, the real rows alone, where the engine wants them.
  States exit_states() const;

  struct Prefilled {
    int rows;
    std::optional<RowLogits> logits;  // of the last token, as row 0, if that was all
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

  void open_window(const Token* tokens, int count, int past, std::vector<FollowOn> follow);
  void open(const Token* tokens, int count, int past, int width, std::vector<FollowOn> follow = {});
  void suffix(int first, int rows);

  TargetSegments segments_;
  TargetShape shape_;
  std::vector<int> widths_;  // that prefix and suffix both take; empty if any
  std::shared_ptr<KVCache> prefix_cache_, suffix_cache_;
  PassPool<Pass> pool_;
  Pass* pass_ = nullptr;
  BoundPass* suffix_ = nullptr;
  int past_ = 0, rows_ = 0;
};

}  // namespace mirror
