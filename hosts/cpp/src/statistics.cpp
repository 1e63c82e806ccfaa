#include "statistics.hpp"

#include <algorithm>
#include <array>

namespace mirror {
namespace {

using Terms = std::array<double, static_cast<std::size_t>(SpanName::count)>;

std::optional<double> ratio(double part, double whole) {
  return whole == 0 ? std::nullopt : std::optional<double>(part / whole);
}

// Milliseconds of each span name, the mean over all rounds.
Terms mean_terms_ms(const std::vector<Round>& rounds) {
  Terms terms{};
  for (const Round& round : rounds)
    for (const Span& span : round.spans)
      terms[static_cast<std::size_t>(span.name)] +=
          1e3 * seconds_between(span.start, span.end) / static_cast<double>(rounds.size());
  return terms;
}

void count_rounds(Statistics& result, const std::vector<Round>& rounds) {
  int wanted = 0, reused = 0, rolled = 0, branches = 0, committed = 0;
  double seconds = 0;
  for (const Round& round : rounds) {
    result.draft_tokens_proposed += round.proposed;
    result.draft_tokens_accepted += round.accepted;
    committed += round.committed;
    wanted += round.reused.has_value();
    reused += round.reused.value_or(false);
    rolled += round.branches > 0;
    branches += round.branches;
    seconds += seconds_between(round.start, round.end);
  }
  result.rounds = static_cast<int>(rounds.size());
  result.generated_tokens += committed;
  result.redrafts = wanted - reused;
  result.acceptance_rate = ratio(result.draft_tokens_accepted, result.draft_tokens_proposed);
  result.tokens_per_round = ratio(committed, result.rounds);
  result.reuse_rate = ratio(reused, wanted);
  result.branches_per_round = ratio(branches, rolled);
  result.decode_tokens_per_s = ratio(committed, seconds);
  result.round_ms = 1e3 * seconds / std::max(result.rounds, 1);
}

}  // namespace

Statistics summarise(const PromptFacts& prompt, const std::vector<Round>& rounds) {
  Statistics result;
  result.prompt_tokens = prompt.tokens;
  result.reused_prompt_tokens = prompt.reused_tokens;
  result.generated_tokens = prompt.first_tokens;
  result.ttft_s = prompt.ttft_s;
  result.target_forward_passes = prompt.passes + static_cast<int>(rounds.size());
  count_rounds(result, rounds);
  const Terms terms = mean_terms_ms(rounds);
  const auto term = [&terms](SpanName name) { return terms[static_cast<std::size_t>(name)]; };
  result.prefix_ms = term(SpanName::prefix);
  result.exit_head_ms = term(SpanName::exit_head);
  result.suffix_ms = term(SpanName::suffix);
  result.trunk_ms = term(SpanName::trunk);
  result.rollout_ms = term(SpanName::rollout);
  result.propose_ms = term(SpanName::propose);
  result.candidate_wait_ms = term(SpanName::candidate_wait);
  result.rollout_wait_ms = term(SpanName::rollout_wait);
  result.redraft_ms = term(SpanName::redraft);
  // What the target's thread spent on nothing of this; choosing tokens included.
  result.host_ms = result.round_ms - result.prefix_ms - result.exit_head_ms - result.suffix_ms -
                   result.rollout_wait_ms - result.redraft_ms - term(SpanName::draft_prefill_wait) -
                   term(SpanName::prefill);
  const double work = result.trunk_ms + result.rollout_ms + result.propose_ms;
  const double exposed = result.rollout_wait_ms + result.redraft_ms;
  if (work > 0) result.draft_hidden = std::max(0.0, 1.0 - exposed / work);
  return result;
}

}  // namespace mirror
