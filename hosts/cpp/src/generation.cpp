#include "generation.hpp"

#include <algorithm>

#include "candidates.hpp"

namespace mirror {

Generation::Generation(Target& target, DraftSeat* seat, Sequence& sequence, Sampler sampler, Stopping stopping,
                       Mode mode, RoundShape shape, std::optional<CoupledNoise> noise, std::function<bool()> cancelled)
    : target_(target),
      seat_(seat),
      sequence_(sequence),
      sampler_(std::move(sampler)),
      stopping_(std::move(stopping)),
      mode_(mode),
      shape_(shape),
      noise_(noise),
      cancelled_(std::move(cancelled)) {}

Tokens Generation::next() {
  if (!started_) {
    started_ = true;
    start_draft();
    return prefill();
  }
  return goes_on() ? step() : Tokens{};
}

void Generation::settle() {
  sequence_.settle();
  if (begun_ && begun_->overlap) begun_->overlap->meeting->abandon();
  begun_.reset();
  // Waits until the draft's thread is idle, so that the next generation finds it so.
  if (seat_ == nullptr || seat_->lost()) return;
  try {
    seat_->finish(seat_->start<Nothing>([states = take_states()](Draft& draft) {
      for (const auto& [start, values] : *states) draft.see_states(start, values);
      return Nothing{};
    }));
  } catch (const Error& error) {
    lose_draft(error);
  }
}

Tokens Generation::step() {
  if (cannot_begin_) std::rethrow_exception(std::exchange(cannot_begin_, nullptr));
  Begun begun = begun_ ? *std::exchange(begun_, std::nullopt) : begin();
  const int first = sequence_.length();
  Tokens window = begun.window;
  if (!begun.proposal.coming.empty()) {
    window = read(begun.proposal);
    begun.overlap = start_rollout(window);
  }
  const auto& overlap = begun.overlap;
  const Outcome outcome = verify_window(window, overlap, begun.launched);
  Tokens tokens(window.begin() + 1, window.begin() + 1 + outcome.accepted);
  tokens.push_back(outcome.next);
  const Tokens committed = commit(std::move(tokens));
  sequence_.cached = first + outcome.accepted;
  const auto rollout = collect(overlap, outcome);
  note(begun, window, outcome, committed.size(), rollout);
  begin_early();
  return committed;
}

// Begins a round: proposes, and starts what needs no waiting. Launching comes first where it is all that there is to
// do, and a proposal that is being made still is waited for by the target's device, not by this thread.
Generation::Begun Generation::begin() {
  Begun begun{mode_, Clock::now(), propose(), {}, target_.launches() && !ahead_, std::nullopt};
  begun.window = window_of(begun.proposal);
  if (begun.launched) launch(begun.window, begun.proposal);
  if (begun.proposal.coming.empty()) begun.overlap = start_rollout(begun.window);
  return begun;
}

// Begins the next round before this one's tokens are handed out, if that only launches: no device waits then.
void Generation::begin_early() {
  if (mode_ == Mode::plain || !(prepared_ || drafts_are_launched_) || !target_.launches() || !goes_on()) return;
  try {
    begun_ = begin();
  } catch (...) {
    cannot_begin_ = std::current_exception();  // when the round's turn has come
  }
}

bool Generation::goes_on() {
  if (!finish_reason && cancelled_()) finish_reason = FinishReason::cancelled;
  return !finish_reason;
}

// Lets the draft read the prompt, at the same time as the target where they overlap.
void Generation::start_draft() {
  if (seat_ == nullptr) return;
  // One that is fed by the target's states reads when they are there.
  const bool reads = mode_ != Mode::plain && !shape_.wants_states;
  reading_ = seat_->start<Nothing>([tokens = copy_of_tokens(), kept = sequence_.cached, reads](Draft& draft) {
    // In plain mode too: the context changes, and a later answer may go on from it.
    draft.keep(kept);
    if (reads) draft.read(*tokens);
    return Nothing{};
  });
  if (mode_ == Mode::serial) wait_reading();
}

void Generation::wait_reading() {
  if (!reading_) return;
  const auto job = std::exchange(reading_, nullptr);
  try {
    const auto span = log_.span(SpanName::draft_prefill_wait);
    seat_->finish(job);
  } catch (const Error& error) {
    lose_draft(error);
  }
}

// Runs the prompt and commits its first answer token; nothing if cancelled on the way.
Tokens Generation::prefill() {
  std::optional<RowLogits> logits;
  while (!logits && goes_on()) {
    const auto span = log_.span(SpanName::prefill);
    const Token* waiting = sequence_.tokens().data() + sequence_.cached;
    const auto done =
        target_.prefill(waiting, sequence_.length() - sequence_.cached, sequence_.cached, shape_.prefill_chunk);
    note_states(sequence_.cached);
    sequence_.cached += done.rows;
    logits = done.logits;
    ++prefill_passes;
  }
  log_.take();
  if (!logits) return {};
  const Token token = choose(*logits, 0, sequence_.length());
  check(*logits, 0, token);
  return commit({token});
}

// How many tokens may still be committed.
int Generation::room() const { return static_cast<int>(std::min<std::int64_t>(stopping_.left(), sequence_.room())); }

// What the draft says comes next.
Proposal Generation::propose() {
  auto prepared = std::exchange(prepared_, std::nullopt);
  const int count = std::max(std::min(shape_.gamma, room() - 1), 0);
  if (!prepared && count > 0 && mode_ != Mode::plain) return redraft(count);
  Proposal proposal;
  if (prepared) proposal.tokens = std::move(*prepared);
  if (proposal.tokens.size() > static_cast<std::size_t>(count)) proposal.tokens.resize(static_cast<std::size_t>(count));
  return proposal;
}

// The window: the last token and the proposal's, or the last one again in place of those that are coming.
Tokens Generation::window_of(const Proposal& proposal) const {
  Tokens window = {sequence_.tokens().back()};
  window.insert(window.end(), proposal.tokens.begin(), proposal.tokens.end());
  window.resize(1 + proposal.size(), window.front());
  return window;
}

// The window once it is known; of one whose draft failed the last token, whose row is right anyway.
Tokens Generation::read(Proposal& proposal) {
  try {
    const auto span = log_.span(SpanName::redraft);
    seat_->read(proposal);
  } catch (const Error& error) {
    lose_draft(error);
    return {sequence_.tokens().back()};
  }
  draft_spans_.insert(draft_spans_.end(), proposal.spans.begin(), proposal.spans.end());
  return window_of(proposal);
}

// A proposal made while the target waits.
Proposal Generation::redraft(int count) {
  wait_reading();
  if (mode_ == Mode::plain) return {};
  Proposal proposal;
  try {
    // Begins before the draft does: waking it may cost this thread its core.
    const auto span = log_.span(SpanName::redraft);
    const auto job = seat_->start<Proposal>(
        [tokens = copy_of_tokens(), states = take_states(), count, noise = noise_](Draft& draft) {
          for (const auto& [start, values] : *states) draft.see_states(start, values);
          return draft.propose(*tokens, count, noise);
        });
    proposal = seat_->finish(job);
    drafts_are_launched_ |= !proposal.coming.empty();
    if (proposal.coming.empty()) draft_spans_.insert(draft_spans_.end(), proposal.spans.begin(), proposal.spans.end());
  } catch (const Error& error) {
    lose_draft(error);
  }
  return proposal;
}

// How far the next window's draft may go; it has at most one token less than there is room for, and begins with x_0.
int Generation::depth() const { return mode_ == Mode::mirror ? std::min(shape_.gamma, room() - 2) : 0; }

// Sends the draft off to continue every likely outcome of this window.
std::optional<Generation::Overlap> Generation::start_rollout(const Tokens& window) {
  const int depth = this->depth();
  if (depth < 1) return std::nullopt;
  auto meeting = std::make_shared<Meeting>();
  auto job = seat_->start<Rollout>(
      [tokens = copy_of_tokens(), states = take_states(), window, depth, meeting, noise = noise_](Draft& draft) {
        for (const auto& [start, values] : *states) draft.see_states(start, values);
        return draft.roll_out(*tokens, window, depth, *meeting, noise);
      });
  return Overlap{std::move(meeting), std::move(job)};
}

// Runs the target over the window and compares.
Outcome Generation::verify_window(const Tokens& window, const std::optional<Overlap>& overlap, bool launched) {
  try {
    const RowLogits logits = run_target(window, overlap, launched);
    const std::int64_t position = sequence_.length();
    Outcome outcome;
    {
      const auto span = log_.span(SpanName::verify);
      outcome = verify(window, [&](int row) { return choose(logits, row, position + row); });
      check(logits, outcome.accepted, outcome.next);
    }
    if (overlap) overlap->meeting->decide(outcome);
    return outcome;
  } catch (...) {
    if (overlap) overlap->meeting->abandon();
    throw;
  }
}

// Starts the target's pass over a window; on devices that only launch all of it, so that they never wait for this
// thread.
void Generation::launch(const Tokens& window, const Proposal& coming) {
  const auto span = log_.span(SpanName::prefix);
  target_.run_prefix(window.data(), static_cast<int>(window.size()), sequence_.length() - 1, coming);
  if (!target_.launches()) return;
  if (shape_.wants_exit && depth() > 0) target_.run_exit_head();
  target_.run_suffix();
}

// The window's logits, at the pass's end; offers the exit's states and candidates on the way. `launched`: whether the
// pass was.
RowLogits Generation::run_target(const Tokens& window, const std::optional<Overlap>& overlap, bool launched) {
  if (std::exchange(ahead_, false)) {
    const auto span = log_.span(SpanName::suffix);
    return read_logits();
  }
  const int start = sequence_.length() - 1;
  const bool offers = overlap && shape_.wants_exit;
  const bool launches = target_.launches();
  if (!launched) launch(window, {});
  if (note_states(start) && overlap) overlap->meeting->state(unseen_.back().second);
  if (offers) {
    const auto span = log_.span(SpanName::exit_head);
    if (!launches) target_.run_exit_head();
    overlap->meeting->offer(target_.exit_candidates());
  }
  const auto span = log_.span(SpanName::suffix);
  if (!launches) target_.run_suffix();
  return read_logits();
}

// The open pass's logits. Where the next token is the likeliest, and alone, its pass is launched before it is read: no
// device waits for this thread then.
RowLogits Generation::read_logits() {
  const bool lone = mode_ == Mode::plain && sampler_.takes_likeliest() && !shape_.wants_states;
  // One token comes of the open pass, and there is no next one if it is the last.
  if (lone && room() > 1)
    if (auto logits = target_.run_ahead(sequence_.length())) {
      ahead_ = true;
      return *std::move(logits);
    }
  return target_.logits();
}

Token Generation::choose(const RowLogits& logits, int row, std::int64_t position) {
  const auto likeliest = sampler_.takes_likeliest() ? logits.likeliest(row) : std::nullopt;
  if (!likeliest && !logits.has_rows()) Sampler::refuse_likeliest();
  const Token token = likeliest ? *likeliest : sampler_.choose(logits.row(row), position);
  sampler_.see(token);
  return token;
}

// Refuses a token that a graph chose among what is no number. Asked for the row that decides: rows before it agreed
// with the draft's tokens, as such rows would not. Where no rows are left, the graph's refusal to name one must do.
void Generation::check(const RowLogits& logits, int row, Token chosen) const {
  if (logits.has_rows() && sampler_.takes_likeliest()) Sampler::check_likeliest(logits.at(row, chosen));
}

// Appends the tokens that count and notes whether they end the answer.
Tokens Generation::commit(Tokens tokens) {
  if (static_cast<int>(tokens.size()) > sequence_.room()) tokens.resize(static_cast<std::size_t>(sequence_.room()));
  finish_reason = stopping_.cut(tokens);
  sequence_.append(tokens);
  if (!finish_reason && sequence_.room() == 0) finish_reason = FinishReason::length;
  return tokens;
}

// Waits for the rollout and takes over the branch that fits, if any.
std::optional<Rollout> Generation::collect(const std::optional<Overlap>& overlap, const Outcome& outcome) {
  if (!overlap) return std::nullopt;
  if (finish_reason) overlap->meeting->abandon();
  try {
    const auto span = log_.span(SpanName::rollout_wait);
    Rollout rollout = seat_->finish(overlap->job);
    draft_spans_.insert(draft_spans_.end(), rollout.spans.begin(), rollout.spans.end());
    const int row = find_branch(rollout.branches, outcome);
    if (row >= 0) prepared_ = rollout.continuations[static_cast<std::size_t>(row)];
    return rollout;
  } catch (const Error& error) {
    lose_draft(error);
    return std::nullopt;
  }
}

void Generation::note(const Begun& begun, const Tokens& window, const Outcome& outcome, std::size_t committed,
                      const std::optional<Rollout>& rollout) {
  std::optional<bool> reused;
  if (rollout && !finish_reason) reused = prepared_.has_value();
  std::vector<Span> spans = log_.take();
  spans.insert(spans.end(), draft_spans_.begin(), draft_spans_.end());
  draft_spans_.clear();
  rounds.push_back({begun.mode, static_cast<int>(window.size()) - 1, outcome.accepted, static_cast<int>(committed),
                    reused, rollout ? static_cast<int>(rollout->branches.size()) : 0, begun.start, Clock::now(),
                    std::move(spans)});
}

void Generation::lose_draft(const Error& error) {
  mode_ = Mode::plain;
  prepared_.reset();
  events.push_back({"draft_lost", error.what()});
}

// Keeps the last prefix pass's states for a draft that is fed by them; returns whether it is.
bool Generation::note_states(int start) {
  if (seat_ == nullptr || !shape_.wants_states) return false;
  unseen_.emplace_back(start, target_.exit_states());
  return true;
}

std::shared_ptr<Generation::SeenStates> Generation::take_states() {
  return std::make_shared<SeenStates>(std::exchange(unseen_, {}));
}

}  // namespace mirror
