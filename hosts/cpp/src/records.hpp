// The records that travel between the stages of a round. Integers only: no session, no thread, no text.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace mirror {

using Token = std::int64_t;
using Tokens = std::vector<Token>;

// How tokens are made. plain: one per target pass. serial: draft, then verify. mirror: overlapped.
enum class Mode { plain, serial, mirror };
enum class FinishReason { stop, length, cancelled };
enum class CandidateSource { exit, draft, both };

inline bool needs_exit(CandidateSource source) { return source != CandidateSource::draft; }
inline bool needs_draft(CandidateSource source) { return source != CandidateSource::exit; }

// A piece of a round's time; `draft_*` names belong to the draft's thread.
enum class SpanName {
  prefill,
  prefix,
  exit_head,
  suffix,
  verify,
  rollout_wait,
  redraft,
  draft_prefill_wait,
  draft_prefill,
  trunk,
  candidate_wait,
  rollout,
  propose,
  count
};

using Clock = std::chrono::steady_clock;

inline double seconds_between(Clock::time_point start, Clock::time_point end) {
  return std::chrono::duration<double>(end - start).count();
}

struct Span {
  SpanName name;
  Clock::time_point start;
  Clock::time_point end;
};

// The likely next tokens of each window position, likeliest first; -1 where there is none.
struct Candidates {
  Tokens ids;                   // [positions, top]
  std::vector<float> logprobs;  // the same; empty where the source has no odds
  int top = 0;
};

// What one verification found.
struct Outcome {
  int accepted = 0;  // draft tokens kept, 0..gamma
  Token next = 0;    // the target's own token after them: the correction, or the bonus
};

// One prepared continuation, keyed by (accepted count, next token).
struct Branch {
  int accepted;
  Token next;
};

// The branches of one window and how they go on.
struct Rollout {
  std::vector<Branch> branches;
  std::vector<Tokens> continuations;  // one per branch
  std::vector<Span> spans;
};

// One round as it went. `reused` is absent where no branch was wanted.
struct Round {
  Mode mode;
  int proposed;
  int accepted;
  int committed;
  std::optional<bool> reused;
  int branches;
  Clock::time_point start;
  Clock::time_point end;
  std::vector<Span> spans;
};

struct Event {
  std::string kind;
  std::string message;
};

// The row of the branch that an outcome takes, -1 if none was prepared.
inline int find_branch(const std::vector<Branch>& branches, const Outcome& outcome) {
  for (std::size_t row = 0; row < branches.size(); ++row)
    if (branches[row].accepted == outcome.accepted && branches[row].next == outcome.next) return static_cast<int>(row);
  return -1;
}

}  // namespace mirror
