#include "target.hpp"

#include <algorithm>
#include <iterator>

namespace mirror {
namespace {

std::vector<int> common_widths(const std::vector<int>& one, const std::vector<int>& other) {
  if (one.empty() || other.empty()) return one.empty() ? other : one;
  std::vector<int> both;
  std::set_intersection(one.begin(), one.end(), other.begin(), other.end(), std::back_inserter(both));
  return both;
}

}  // namespace

Target::Target(TargetSegments segments, const TargetShape& shape)
    : segments_(std::move(segments)),
      shape_(shape),
      widths_(common_widths(segments_.prefix->widths(), segments_.suffix->widths())),
      prefix_cache_(segments_.prefix->make_cache()),
      suffix_cache_(segments_.suffix->make_cache()) {}

void Target::run_prefix(const Token* tokens, int count, int past, const Proposal& coming) {
  std::vector<FollowOn> follow;
  int place = 1;
  for (const auto& [sent, gives] : coming.coming) {
    follow.push_back({{}, sent, 0, place, 1, gives, gives});
    place += gives;
  }
  open_window(tokens, count, past, std::move(follow));
}

void Target::open_window(const Token* tokens, int count, int past, std::vector<FollowOn> follow) {
  open(tokens, count, past, fit_width(widths_, shape_.pinned_width.value_or(count)), std::move(follow));
}

void Target::run_exit_head() {
  if (!pass_->exit_head) pass_->exit_head = segments_.exit_head->bind(pass_->feeds, pass_->feeds.width, nullptr);
  pass_->exit_head->run(past_);
  pass_->exit_head->send();  // before the suffix, which must not come between
}

Candidates Target::exit_candidates() {
  const PassOutputs& out = pass_->exit_head->outputs();
  const auto count = static_cast<std::size_t>(rows_ * out.top);
  return {Tokens(out.candidate_ids, out.candidate_ids + count),
          std::vector<float>(out.candidate_logprobs, out.candidate_logprobs + count), out.top};
}

void Target::run_suffix() {
  // Pinned: the LM head too must run on the same number of rows in every pass.
  suffix(0, shape_.pinned_width ? pass_->feeds.width : rows_);
}

RowLogits Target::logits() {
  suffix_->outputs();  // whoever reads rows finds the pass at its end
  return RowLogits(*suffix_, shape_.vocab_size);
}

std::optional<RowLogits> Target::run_ahead(int past) {
  const auto given = suffix_->launched_ids();
  if (!given || segments_.hidden_on_host) return std::nullopt;
  auto sent = suffix_->send_ids();  // before the next pass writes over them
  const Token unknown = 0;
  open(&unknown, 1, past, fit_width(widths_, shape_.pinned_width.value_or(1)),
       {FollowOn{*given, nullptr, 0, 0, 1, 1, 1}});
  run_suffix();
  sent->wait();
  return RowLogits(std::move(sent), shape_.vocab_size);
}

Target::Prefilled Target::prefill(const Token* tokens, int count, int past, int chunk) {
  const Chunk next = chunk_width(widths_, std::min(chunk, count), shape_.capacity - past);
  open(tokens, next.rows, past, next.width);
  suffix(next.rows - 1, 1);
  if (next.rows < count) return {next.rows, std::nullopt};
  return {next.rows, logits()};
}

void Target::open(const Token* tokens, int count, int past, int width, std::vector<FollowOn> follow) {
  pass_ = &pool_.at(width, [&] {
    auto made = std::make_unique<Pass>(width, shape_.max_positions);
    made->feeds.hidden_on_host = segments_.hidden_on_host;
    made->prefix = segments_.prefix->bind(made->feeds, width, prefix_cache_);
    return made;
  });
  past_ = past;
  rows_ = count;
  pass_->feeds.fill_causal(tokens, count, past);
  pass_->feeds.follow = std::move(follow);  // none too: a pass that failed may have left its own
  pass_->prefix->run(past);
}

void Target::suffix(int first, int rows) {
  auto& bound = pass_->suffix[rows];
  if (!bound) bound = segments_.suffix->bind(pass_->feeds, rows, suffix_cache_);
  pass_->feeds.want_rows(first, rows);
  suffix_ = bound.get();
  suffix_->run(past_);
}

States Target::exit_states() const {
  const std::size_t bytes = shape_.state_bytes * static_cast<std::size_t>(rows_);
  const std::byte* data = pass_->prefix->hidden();
  return {std::vector<std::byte>(data, data + bytes), rows_};
}

}  // namespace mirror
