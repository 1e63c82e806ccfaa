#include "model_draft.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "candidates.hpp"

namespace mirror {

ModelDraft::ModelDraft(std::unique_ptr<Segment> trunk, std::unique_ptr<Segment> branch, DraftShape shape,
                       CandidateSource source, std::vector<int> fanout)
    : trunk_(std::move(trunk)),
      branch_(std::move(branch)),
      shape_(std::move(shape)),
      source_(source),
      fanout_(std::move(fanout)),
      cache_(branch_->make_cache()),
      slots_(std::make_shared<std::vector<std::int32_t>>(static_cast<std::size_t>(shape_.capacity), no_branch)),
      states_(shape_.state_bytes * static_cast<std::size_t>(shape_.capacity)) {
  if (shape_.adapts) pace_.emplace(std::accumulate(fanout_.begin(), fanout_.end(), 0));
}

void ModelDraft::keep(int length) { filled_ = std::min(filled_, length); }

void ModelDraft::see_states(int start, const States& states) {
  if (shape_.state_bytes == 0) return;
  std::copy(states.bytes.begin(), states.bytes.end(),
            states_.begin() + static_cast<std::ptrdiff_t>(shape_.state_bytes) * start);
}

void ModelDraft::read(const Tokens& tokens) {
  know(static_cast<int>(tokens.size()) - 1);
  const auto span = log_.span(SpanName::draft_prefill);
  advance(tokens, 1, std::nullopt);
}

Proposal ModelDraft::propose(const Tokens& tokens, int count, const Noise& noise) {
  const Clock::time_point start = Clock::now();
  // A context read ahead of time would have no logits left; its last row is run again.
  know(static_cast<int>(tokens.size()) - 1);
  std::vector<Given> passes;
  for (const BranchPass& item : branch_passes(shape_.proposal_tokens_per_pass, count))
    passes.push_back(passes.empty() ? advance(tokens, item.gives, noise) : go_on(passes.back(), item.gives, noise));
  // The target would have no embedding for a token that it doesn't know.
  const bool launched = std::all_of(passes.begin(), passes.end(),
                                    [](const Given& pass) { return pass.sent && pass.sent->mark() != nullptr; });
  if (launched && shape_.vocab_size <= shape_.target_vocab_size) {
    Proposal proposal{{}, log_.take(), {}, start};
    for (const Given& pass : passes) proposal.coming.push_back({pass.sent, pass.gives});
    return proposal;
  }
  Tokens line;
  for (const Given& pass : passes) {
    const Token* next = pass.wait();
    line.insert(line.end(), next, next + pass.gives);
  }
  log_.note(SpanName::propose, start);
  line.erase(std::find_if_not(line.begin(), line.end(), [this](Token token) { return known(token); }), line.end());
  return {std::move(line), log_.take(), {}, {}};
}

Rollout ModelDraft::roll_out(const Tokens& tokens, const Tokens& window, int depth, Meeting& meeting,
                             const Noise& noise) {
  const Clock::time_point start = Clock::now();
  learn_pace();
  const int base = static_cast<int>(tokens.size()) - 1;
  know(base);
  wait_states(base, meeting);
  Candidates own;
  {
    const auto span = log_.span(SpanName::trunk);
    if (filled_ < base) advance(Tokens(tokens.begin(), tokens.end() - 1), 1, std::nullopt);
    own = run_trunk(window, noise.has_value());
  }
  Rollout rollout;
  rollout.branches = branches(window, std::move(own), meeting, noise);
  rollout.continuations.resize(rollout.branches.size());
  {
    const auto span = log_.span(SpanName::rollout);
    continue_all(rollout, base, depth, meeting, noise);
  }
  for (Tokens& line : rollout.continuations)
    line.erase(std::find_if_not(line.begin(), line.end(), [this](Token token) { return known(token); }), line.end());
  rollout.spans = log_.take();
  last_ = Ended{meeting.decided(), start, Clock::now()};
  return rollout;
}

// Takes in how late the last rollout was, now that its outcome is known.
void ModelDraft::learn_pace() {
  if (pace_ && last_ && last_->decided->at) {
    const auto seconds = [](auto span) { return std::chrono::duration<double>(span).count(); };
    pace_->note(seconds(last_->end - *last_->decided->at), seconds(last_->end - last_->start));
  }
  last_.reset();
}

// Begins with a context whose first `count` tokens have exit states and may keep their rows.
void ModelDraft::know(int count) {
  // Rows past these were drafted before their feature was known; they are run again with it.
  if (shape_.state_bytes > 0) keep(known_states_ + 1);
  keep(count);
  known_states_ = count;
}

void ModelDraft::wait_states(int base, Meeting& meeting) {
  if (shape_.state_bytes == 0) return;
  const auto span = log_.span(SpanName::candidate_wait);
  const auto states = meeting.wait_states();
  if (!states) return;
  see_states(base, *states);
  known_states_ = base + states->rows;
}

std::vector<Branch> ModelDraft::branches(const Tokens& window, Candidates own, Meeting& meeting, const Noise& noise) {
  // The draft's candidates go first: at equal rank they are right more often than the exit's.
  std::vector<Candidates> sources;
  if (needs_draft(source_)) sources.push_back(std::move(own));
  if (needs_exit(source_)) {
    const auto span = log_.span(SpanName::candidate_wait);
    auto offered = meeting.wait_candidates();
    if (!offered) return {};
    sources.push_back(std::move(*offered));
  }
  if (noise) {
    Places after;
    for (std::size_t row = 0; row < window.size(); ++row)
      after.push_back(filled_ - static_cast<int>(window.size()) + 1 + static_cast<int>(row));
    for (Candidates& source : sources) noise->order(source, after);
  }
  const std::vector<Branch> chosen = choose_branches(window, sources, fanout_);
  // One that the first pass leaves out would propose nothing, where a proposal made anew may.
  const int most = branches_at(0, static_cast<int>(chosen.size()), shape_.branches_per_pass);
  return likeliest(chosen, fanout_, pace_ ? pace_->first(most) : most);
}

// Runs the tokens not read yet; returns the `gives` likeliest tokens after them.
ModelDraft::Given ModelDraft::advance(const Tokens& tokens, int gives, const Noise& noise) {
  const std::vector<int>& widths = branch_->widths();
  for (;;) {
    const int waiting = static_cast<int>(tokens.size()) - filled_;
    const Token* next = tokens.data() + filled_;
    const int rows = std::min(waiting, shape_.prefill_chunk) + gives - 1;
    const Chunk chunk = chunk_width(widths, rows, shape_.capacity - filled_);
    if (waiting == 1) return step(next, 1, {}, gives, fit_width(widths, rows), noise);
    if (chunk.rows == waiting + gives - 1) return step(next, waiting, {}, gives, chunk.width, noise);
    // Never the last one: the streams follow it in its own pass.
    step(next, std::min(chunk.rows, waiting - 1), {}, 1, chunk.width, std::nullopt);
  }
}

// Runs what the last pass gave; returns the `gives` likeliest tokens after that.
ModelDraft::Given ModelDraft::go_on(const Given& last, int gives, const Noise& noise) {
  const Tokens unknown(static_cast<std::size_t>(last.gives));
  const Token* tokens = last.launched ? unknown.data() : last.tokens.data();
  return step(tokens, last.gives, last.launched, gives, fit_width(branch_->widths(), last.gives + gives - 1), noise);
}

// Runs one pass of the trunk's next tokens, which may be on the device alone; returns the `gives` likeliest after the
// last one.
ModelDraft::Given ModelDraft::step(const Token* tokens, int count, const std::optional<LaunchedIds>& launched,
                                   int gives, int width, const Noise& noise) {
  const int past = filled_, rows = count + gives - 1;
  std::vector<BranchRow> all;
  for (int row = 0; row < rows; ++row) {
    const bool stream = row >= count;
    const Token token = stream ? shape_.vocab_size + (row - count) : embeddable(tokens[row]);
    all.push_back({token, past + row, std::min(past + row + 1, past + count), stream ? 0 : trunk_row, -1});
  }
  const auto streams = slots_->begin() + past + count;
  std::fill(streams, streams + (gives - 1), 0);
  Pass& pass = pass_at(width);
  pass.feeds.fill_rows(all, past);
  pass.feeds.want_rows(count - 1, gives);
  pass.feeds.follow.clear();
  if (launched) pass.feeds.follow.push_back({*launched, nullptr, 0, 0, 1, count, rows});
  Given given = give(pass, all, gives, past, noise);
  given.gives = gives;
  std::fill(streams, streams + (gives - 1), no_branch);
  filled_ += count;
  return given;
}

// Runs the window; returns the draft's candidates for each of its rows.
Candidates ModelDraft::run_trunk(const Tokens& window, bool drawn) {
  const int past = filled_, count = static_cast<int>(window.size());
  Pass& pass = pass_at(fit_width(trunk_->widths(), count));
  Tokens ids;
  for (const Token token : window) ids.push_back(embeddable(token));
  pass.feeds.fill_causal(ids.data(), count, past);
  pass.feeds.want_rows(0, count);
  feed_states(pass.feeds, window.size(), nullptr);
  Candidates found = candidates(pass, count, past, drawn);
  filled_ += count;
  return found;
}

void ModelDraft::Alive::keep(std::size_t place, std::size_t count, int read) {
  const auto part = [&](auto& all) {
    all.erase(all.begin() + static_cast<std::ptrdiff_t>(place + count), all.end());
    all.erase(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(place));
  };
  part(rows);
  if (given)
    first += static_cast<int>(place) * read;
  else
    part(tokens);
}

// Leaves the branches worth continuing: the first ones until the outcome is known, then at most the one that it takes.
// `number`: the pass's; `read`: tokens of each branch that it reads. Returns whether there are any.
bool ModelDraft::narrow(Alive& alive, std::size_t number, int read, const std::vector<Branch>& branches,
                        Meeting& meeting) const {
  if (alive.rows.empty() || meeting.abandoned()) return false;
  const auto outcome = meeting.outcome();
  if (!outcome) {
    const int all = static_cast<int>(branches.size());
    int most = branches_at(number, all, shape_.branches_per_pass);
    if (pace_) most = std::min(most, pace_->later(number, all));
    if (static_cast<std::size_t>(most) < alive.rows.size()) alive.keep(0, static_cast<std::size_t>(most), read);
    return true;
  }
  const auto place = std::find(alive.rows.begin(), alive.rows.end(), find_branch(branches, *outcome));
  if (place == alive.rows.end()) return false;
  alive.keep(static_cast<std::size_t>(place - alive.rows.begin()), 1, read);
  return true;
}

// Continues every branch as far as it may go; once the outcome is known, only the one that it takes.
void ModelDraft::continue_all(Rollout& rollout, int base, int depth, Meeting& meeting, const Noise& noise) {
  Alive alive;
  alive.rows = by_likelihood(rollout.branches, fanout_);
  for (const int row : alive.rows) alive.tokens.push_back({rollout.branches[static_cast<std::size_t>(row)].next});
  std::vector<Given> passes;
  const int first_slot = filled_;
  int slot = filled_, read = 0;
  for (const BranchPass& item : branch_passes(shape_.tokens_per_pass, depth)) {
    if (!narrow(alive, passes.size(), item.real, rollout.branches, meeting)) break;
    passes.push_back(branch_pass(item, alive, rollout.branches, base, read, slot, noise));
    hand_on(passes.back(), alive);
    read += item.real;
  }
  std::fill(slots_->begin() + first_slot, slots_->begin() + slot, no_branch);
  // Where passes are only launched, this is the first wait since the branches were chosen.
  for (const Given& pass : passes) {
    const Token* next = pass.wait();
    for (const int row : pass.rows) {
      Tokens& line = rollout.continuations[static_cast<std::size_t>(row)];
      line.insert(line.end(), next, next + pass.gives);
      next += pass.gives;
    }
  }
}

// What a pass gave is what the next one reads.
void ModelDraft::hand_on(const Given& pass, Alive& alive) {
  alive.given = pass.launched;
  alive.first = 0;
  alive.tokens.clear();
  if (alive.given) return;
  for (auto next = pass.tokens.begin(); next != pass.tokens.end(); next += pass.gives)
    alive.tokens.emplace_back(next, next + pass.gives);
}

// Runs one pass over some branches, each one's rows side by side; moves `slot` to the next free one.
// `read`: tokens of each branch that earlier passes read.
ModelDraft::Given ModelDraft::branch_pass(const BranchPass& item, const Alive& alive,
                                          const std::vector<Branch>& branches, int base, int read, int& slot,
                                          const Noise& noise) {
  const int count = static_cast<int>(alive.rows.size()) * item.rows();
  Pass& pass = pass_at(fit_width(branch_->widths(), count));
  std::vector<BranchRow> rows;
  rows.reserve(static_cast<std::size_t>(count));
  std::vector<std::size_t> stream_slots;
  std::size_t wanted = 0;
  for (std::size_t index = 0; index < alive.rows.size(); ++index) {
    const std::int32_t owner = alive.rows[index];
    const int start = base + 1 + branches[static_cast<std::size_t>(owner)].accepted;
    for (int row = 0; row < item.rows(); ++row) {
      const bool stream = row >= item.real;
      const Token token = stream        ? shape_.vocab_size + (row - item.real)
                          : alive.given ? 0
                                        : embeddable(alive.tokens[index][static_cast<std::size_t>(row)]);
      const std::size_t at = static_cast<std::size_t>(slot) + rows.size();
      (*slots_)[at] = owner;
      if (stream) stream_slots.push_back(at);
      if (row >= item.real - 1) pass.feeds.logit_rows[wanted++] = static_cast<std::int64_t>(rows.size());
      rows.push_back({token, start + read + row, start, owner, start});
    }
  }
  std::fill(pass.feeds.logit_rows.begin() + static_cast<std::ptrdiff_t>(wanted), pass.feeds.logit_rows.end(),
            pass.feeds.logit_rows[wanted - 1]);
  pass.feeds.fill_rows(rows, slot);
  pass.feeds.follow.clear();
  if (alive.given)
    pass.feeds.follow.push_back(
        {*alive.given, nullptr, alive.first, 0, static_cast<int>(alive.rows.size()), item.real, item.rows()});
  Given given = give(pass, rows, static_cast<int>(wanted), slot, noise);
  given.rows = alive.rows;
  given.gives = item.gives;
  for (const std::size_t at : stream_slots) (*slots_)[at] = no_branch;  // seen by its own pass alone
  slot += pass.feeds.width;
  return given;
}

// As choose; where passes are only launched, without waiting for what this one gives.
ModelDraft::Given ModelDraft::give(Pass& pass, const std::vector<BranchRow>& rows, int wanted, int past,
                                   const Noise& noise) {
  if (noise || !branch_->launches()) return {{}, 0, choose(pass, rows, wanted, past, noise), nullptr, {}};
  feed_states(pass.feeds, rows.size(), &rows);
  BoundPass& ran = run(pass, false, wanted, past);
  return {{}, 0, {}, ran.send_ids(), ran.launched_ids()};
}

// Runs a pass whose wanted rows are noted in its feeds; returns the token that each of them proposes.
Tokens ModelDraft::choose(Pass& pass, const std::vector<BranchRow>& rows, int wanted, int past, const Noise& noise) {
  feed_states(pass.feeds, rows.size(), &rows);
  if (!noise) {
    const PassOutputs& out = run(pass, false, wanted, past).outputs();
    return Tokens(out.token_ids, out.token_ids + wanted);
  }
  Places after;
  for (int index = 0; index < wanted; ++index)
    after.push_back(rows[static_cast<std::size_t>(pass.feeds.logit_rows[static_cast<std::size_t>(index)])].position +
                    1);
  Candidates found = candidates(pass, wanted, past, true);
  noise->order(found, after);
  Tokens best;
  for (int index = 0; index < wanted; ++index) best.push_back(found.ids[static_cast<std::size_t>(index * found.top)]);
  return best;
}

Candidates ModelDraft::candidates(Pass& pass, int wanted, int past, bool drawn) {
  pass.feeds.drawn = drawn;
  const PassOutputs& out = run(pass, true, wanted, past).outputs();
  const int count = wanted * out.top;
  Candidates found{Tokens(out.candidate_ids, out.candidate_ids + count),
                   std::vector<float>(out.candidate_logprobs, out.candidate_logprobs + count), out.top};
  // Padding of the draft's vocabulary is no token of the target.
  for (Token& id : found.ids)
    if (!known(id)) id = -1;
  return found;
}

BoundPass& ModelDraft::run(Pass& pass, bool with_candidates, int wanted, int past) {
  Segment& segment = with_candidates ? *trunk_ : *branch_;
  auto& bound = (with_candidates ? pass.trunk : pass.branch)[wanted];
  if (!bound) bound = segment.bind(pass.feeds, wanted, cache_);
  bound->run(past);
  return *bound;
}

// Gives each row the exit layer's state of the position before it, where the target has seen that token.
// A branch's row at its first token still has one; what follows it is the branch's own.
void ModelDraft::feed_states(PassFeeds& feeds, std::size_t rows, const std::vector<BranchRow>* branch_rows) const {
  if (shape_.state_bytes == 0) return;
  feeds.features.resize(shape_.state_bytes * feeds.ids.size());
  for (std::size_t row = 0; row < feeds.ids.size(); ++row) {
    const std::int64_t position = feeds.positions[row];
    const bool of_branch = row < rows && branch_rows != nullptr && (*branch_rows)[row].start >= 0;
    const int last = of_branch ? std::min((*branch_rows)[row].start, known_states_) : known_states_;
    const bool has = row < rows && position >= 1 && position <= last;
    std::byte* to = feeds.features.data() + row * shape_.state_bytes;
    feeds.feature_rows[row] = has ? 1.0f : 0.0f;
    if (has)
      std::memcpy(to, states_.data() + static_cast<std::size_t>(position - 1) * shape_.state_bytes, shape_.state_bytes);
    else
      std::memset(to, 0, shape_.state_bytes);
  }
}

ModelDraft::Pass& ModelDraft::pass_at(int width) {
  return pool_.at(width, [&] { return std::make_unique<Pass>(width, shape_.max_positions, slots_); });
}

// A token that the draft has no embedding for is replaced; only its guesses suffer.
Token ModelDraft::embeddable(Token token) const { return std::clamp<Token>(token, 0, shape_.vocab_size - 1); }

}  // namespace mirror
