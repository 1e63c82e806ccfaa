// What the round loop asks of a draft, and where a round's two threads meet.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "device.hpp"
#include "proposal.hpp"
#include "records.hpp"
#include "sampling.hpp"

namespace mirror {

// Where the target's thread and the draft's thread meet in one round. The target's thread offers the
// exit's states and candidates and decides the outcome; the draft's thread waits for the former, if
// it wants them, and looks for the latter between two passes. Each is set once.
class Meeting {
 public:
  // When the outcome was known, for who looks later; nothing if nobody wanted the rollout in the end.
  struct Decided {
    std::optional<Clock::time_point> at;
  };

  void state(States states) {
    const std::lock_guard<std::mutex> lock(mutex_);
    states_ = std::move(states);
    changed_.notify_all();
  }

  void offer(Candidates candidates) {
    const std::lock_guard<std::mutex> lock(mutex_);
    candidates_ = std::move(candidates);
    changed_.notify_all();
  }

  // Branches that the outcome doesn't take need not be continued.
  void decide(const Outcome& outcome) {
    const std::lock_guard<std::mutex> lock(mutex_);
    outcome_ = outcome;
    decided_->at = Clock::now();
  }

  // Nobody wants the rollout any more.
  void abandon() {
    const std::lock_guard<std::mutex> lock(mutex_);
    abandoned_ = true;
    decided_->at.reset();
    changed_.notify_all();
  }

  // Wait; nothing if the round was abandoned first.
  std::optional<States> wait_states() { return wait_for(states_); }
  std::optional<Candidates> wait_candidates() { return wait_for(candidates_); }

  std::optional<Outcome> outcome() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return outcome_;
  }

  // To be read once the round is over.
  std::shared_ptr<const Decided> decided() const { return decided_; }

  bool abandoned() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return abandoned_;
  }

 private:
  template <typename Value>
  std::optional<Value> wait_for(std::optional<Value>& value) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return value.has_value() || abandoned_; });
    return std::move(value);
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<States> states_;
  std::optional<Candidates> candidates_;
  std::optional<Outcome> outcome_;
  std::shared_ptr<Decided> decided_ = std::make_shared<Decided>();
  bool abandoned_ = false;
};

// A proposer of tokens; one thread at a time. `tokens` is always the whole committed context, whose
// last token is the first of the next window. `noise`: what the target's draws will be made with;
// absent where it takes the likeliest.
class Draft {
 public:
  virtual ~Draft() = default;
  // Forgets everything read past the first `length` tokens: the context has changed there.
  virtual void keep(int length) = 0;
  // Takes the exit layer's states of the tokens at positions start...
  virtual void see_states(int start, const States& states) = 0;
  // Reads a context ahead of time, as during the target's prefill.
  virtual void read(const Tokens& tokens) = 0;
  // At most `count` tokens to follow the context.
  virtual Proposal propose(const Tokens& tokens, int count, const std::optional<CoupledNoise>& noise) = 0;
  // Continues every likely outcome of a window by `depth` tokens; `tokens` ends in the window's first.
  virtual Rollout roll_out(const Tokens& tokens, const Tokens& window, int depth, Meeting& meeting,
                           const std::optional<CoupledNoise>& noise) = 0;
};

}  // namespace mirror
