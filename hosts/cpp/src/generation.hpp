// The round loop: propose, verify, commit. One Generation makes one answer over one sequence. The
// target runs on the calling thread, the draft in its seat's thread. Whatever the draft does, the
// tokens are those that the target alone would choose; a draft that fails is left out.
#pragma once

#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "draft.hpp"
#include "sampling.hpp"
#include "sequence.hpp"
#include "spans.hpp"
#include "stopping.hpp"
#include "target.hpp"
#include "worker.hpp"

namespace mirror {

// What a round looks like.
struct RoundShape {
  int gamma;          // the most draft tokens of a window
  int prefill_chunk;  // the most rows of a prefill pass
  bool wants_exit;    // whether the rollout waits for the exit's candidates
  bool wants_states;  // whether the draft is fed by the exit layer's states
};

class Generation {
 public:
  // `seat` may be null; whatever is passed by reference must outlive this.
  Generation(Target& target, DraftSeat* seat, Sequence& sequence, Sampler sampler, Stopping stopping, Mode mode,
             RoundShape shape, std::optional<CoupledNoise> noise, std::function<bool()> cancelled);

  // The tokens of the next commit; empty when the answer has ended, or was cancelled before its first token.
  Tokens next();

  // Leaves sequence and draft ready for the next answer; call it however this one ended.
  void settle();

  std::optional<FinishReason> finish_reason;
  std::vector<Round> rounds;
  std::vector<Event> events;
  int prefill_passes = 0;

 private:
  struct Overlap {
    std::shared_ptr<Meeting> meeting;
    std::shared_ptr<Job<Rollout>> job;
  };
  // A round that has begun.
  struct Begun {
    Mode mode;
    Clock::time_point start;
    Proposal proposal;  // held until the target's pass has ended, which may read where its tokens come to the host
    Tokens window;      // x_0 and the proposal's tokens, or any in place of those that are coming
    bool launched;      // whether the target's pass was
    std::optional<Overlap> overlap;  // one over a window that is coming still begins later
  };
  using SeenStates = std::vector<std::pair<int, States>>;

  bool goes_on();
  void start_draft();
  void wait_reading();
  Tokens prefill();
  Tokens step();
  int room() const;
  Begun begin();
  void begin_early();
  Proposal propose();
  Proposal redraft(int count);
  Tokens window_of(const Proposal& proposal) const;
  Tokens read(Proposal& proposal);
  void launch(const Tokens& window, const Proposal& coming);
  int depth() const;
  std::optional<Overlap> start_rollout(const Tokens& window);
  Outcome verify_window(const Tokens& window, const std::optional<Overlap>& overlap, bool launched);
  RowLogits run_target(const Tokens& window, const std::optional<Overlap>& overlap, bool launched);
  RowLogits read_logits();
  Token choose(const RowLogits& logits, int row, std::int64_t position);
  void check(const RowLogits& logits, int row, Token chosen) const;
  Tokens commit(Tokens tokens);
  std::optional<Rollout> collect(const std::optional<Overlap>& overlap, const Outcome& outcome);
  void note(const Begun& begun, const Tokens& window, const Outcome& outcome, std::size_t committed,
            const std::optional<Rollout>& rollout);
  void lose_draft(const Error& error);
  std::shared_ptr<const Tokens> copy_of_tokens() const { return std::make_shared<const Tokens>(sequence_.tokens()); }
  bool note_states(int start);
  std::shared_ptr<SeenStates> take_states();

  Target& target_;
  DraftSeat* seat_;
  Sequence& sequence_;
  Sampler sampler_;
  Stopping stopping_;
  Mode mode_;
  RoundShape shape_;
  std::optional<CoupledNoise> noise_;
  std::function<bool()> cancelled_;
  bool started_ = false;
  SpanLog log_;
  std::vector<Span> draft_spans_;
  std::optional<Tokens> prepared_;
  bool ahead_ = false;               // whether the next round's pass was launched already
  std::optional<Begun> begun_;       // the next round,
  std::exception_ptr cannot_begin_;  // or why it can't begin
  bool drafts_are_launched_ = false;
  std::shared_ptr<Job<Nothing>> reading_;
  SeenStates unseen_;
};

}  // namespace mirror
