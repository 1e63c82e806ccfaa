#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>

#include "error.hpp"
#include "noise.hpp"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace mirror {
namespace {

// Kept tokens with a Gumbel of their own; the others share one.
constexpr std::size_t head_tokens = 256;

template <typename Value>
void require(bool holds, const char* name, Value found, const char* expected) {
  if (holds) return;
  std::ostringstream text;
  text << name << " is " << found << "; it must be " << expected;
  throw Error(ErrorKind::request, text.str());
}

[[noreturn]] void refuse(const char* found) {
  throw Error(ErrorKind::device, std::string("the target's greatest logit is ") + found +
                                     "; the device or the precision can't run this model");
}

void check_finite(float greatest) {
  if (!std::isfinite(greatest)) refuse(std::isnan(greatest) ? "nan" : greatest > 0 ? "inf" : "-inf");
}

constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();

// The greatest of a block, or NaN if it holds one.
float block_max_plain(const float* values, int count) {
  float best = -std::numeric_limits<float>::infinity();
  for (int index = 0; index < count; ++index) {
    if (std::isnan(values[index])) return nan_value;
    best = std::max(best, values[index]);
  }
  return best;
}

#ifdef __SSE2__
// Compilers don't make vectors of a maximum that minds NaN; a row of 49,152 took 14 us without this, 3 with it.
float block_max(const float* values, int count) {
  if (count % 16 != 0) return block_max_plain(values, count);
  __m128 best = _mm_loadu_ps(values), other = best, odd = _mm_setzero_ps();
  for (const float* at = values; at < values + count; at += 16) {
    const __m128 a = _mm_loadu_ps(at), b = _mm_loadu_ps(at + 4), c = _mm_loadu_ps(at + 8), d = _mm_loadu_ps(at + 12);
    odd = _mm_or_ps(odd, _mm_or_ps(_mm_cmpunord_ps(a, b), _mm_cmpunord_ps(c, d)));
    best = _mm_max_ps(best, _mm_max_ps(a, b));
    other = _mm_max_ps(other, _mm_max_ps(c, d));
  }
  if (_mm_movemask_ps(odd) != 0) return nan_value;
  float lanes[4];
  _mm_storeu_ps(lanes, _mm_max_ps(best, other));
  return std::max(std::max(lanes[0], lanes[1]), std::max(lanes[2], lanes[3]));
}
#else
float block_max(const float* values, int count) { return block_max_plain(values, count); }
#endif

}  // namespace

int argmax(const float* values, int count) {
  constexpr int block = 1024;
  float best = -std::numeric_limits<float>::infinity();
  int best_start = 0;
  for (int start = 0; start < count; start += block) {
    const float greatest = block_max(values + start, std::min(block, count - start));
    if (std::isnan(greatest))
      return static_cast<int>(std::find_if(values, values + count, [](float v) { return std::isnan(v); }) - values);
    if (greatest > best) best = greatest, best_start = start;
  }
  return static_cast<int>(std::find(values + best_start, values + count, best) - values);
}

void SamplingParams::check() const {
  require(temperature >= 0.0 && std::isfinite(temperature), "temperature", temperature, "0 (greedy) or more");
  require(top_k >= 0, "top_k", top_k, "0 (all tokens) or more");
  require(top_p > 0.0 && top_p <= 1.0, "top_p", top_p, "above 0 and at most 1 (all tokens)");
  require(min_p >= 0.0 && min_p <= 1.0, "min_p", min_p, "between 0 (all tokens) and 1");
  require(repetition_penalty > 0.0 && std::isfinite(repetition_penalty), "repetition_penalty", repetition_penalty,
          "above 0");
}

Sampler::Sampler(const SamplingParams& params, int vocab_size, const Tokens& context)
    : params_(params), vocab_size_(vocab_size) {
  if (params.repetition_penalty == 1.0) return;
  seen_.assign(static_cast<std::size_t>(vocab_size), 0);
  for (const Token token : context) see(token);
}

Token Sampler::choose(const float* logits, std::int64_t position) {
  if (params_.temperature == 0.0) return choose_greedy(logits);
  check_finite(logits[argmax(logits, vocab_size_)]);
  keep_finite(logits);
  keep_top_k();
  keep_top_p();
  keep_min_p();
  return draw(position);
}

void Sampler::check_likeliest(float logit) { check_finite(logit); }

void Sampler::refuse_likeliest() { refuse("no finite number"); }

Token Sampler::choose_greedy(const float* logits) const {
  if (seen_.empty()) {
    const int token = argmax(logits, vocab_size_);
    check_finite(logits[token]);
    return token;
  }
  std::vector<float> lowered(static_cast<std::size_t>(vocab_size_));
  for (int token = 0; token < vocab_size_; ++token) lowered[static_cast<std::size_t>(token)] = penalised(logits, token);
  const int token = argmax(lowered.data(), vocab_size_);
  check_finite(lowered[static_cast<std::size_t>(token)]);
  return token;
}

float Sampler::penalised(const float* logits, int token) const {
  const float logit = logits[token];
  if (seen_.empty() || !seen_[static_cast<std::size_t>(token)]) return logit;
  const float penalty = static_cast<float>(params_.repetition_penalty);
  return logit < 0 ? logit * penalty : logit / penalty;
}

void Sampler::keep_finite(const float* logits) {
  ids_.clear();
  scores_.clear();
  for (int token = 0; token < vocab_size_; ++token) {
    const double score = static_cast<double>(penalised(logits, token)) / params_.temperature;
    if (score > -std::numeric_limits<double>::infinity()) {
      ids_.push_back(token);
      scores_.push_back(score);
    }
  }
  const double greatest = *std::max_element(scores_.begin(), scores_.end());
  for (double& score : scores_) score -= greatest;
}

template <typename Keep>
void Sampler::keep_where(Keep keep) {
  std::size_t kept = 0;
  for (std::size_t index = 0; index < ids_.size(); ++index)
    if (keep(index)) {
      ids_[kept] = ids_[index];
      scores_[kept++] = scores_[index];
    }
  ids_.resize(kept);
  scores_.resize(kept);
}

void Sampler::keep_top_k() {
  const auto count = static_cast<std::size_t>(params_.top_k);
  if (count == 0 || count >= ids_.size()) return;
  weights_ = scores_;
  std::nth_element(weights_.begin(), weights_.begin() + static_cast<std::ptrdiff_t>(count - 1), weights_.end(),
                   std::greater<>());
  const double kth = weights_[count - 1];
  keep_where([&](std::size_t index) { return scores_[index] >= kth; });
}

// Fills order_ with the `count` likeliest, greatest first, ties by lower id.
void Sampler::order_likeliest(std::size_t count) {
  order_.resize(ids_.size());
  std::iota(order_.begin(), order_.end(), 0);
  const auto likelier = [this](std::int32_t a, std::int32_t b) {
    const double left = scores_[static_cast<std::size_t>(a)], right = scores_[static_cast<std::size_t>(b)];
    return left != right ? left > right : a < b;
  };
  if (count < order_.size()) {
    std::nth_element(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(count), order_.end(), likelier);
    order_.resize(count);
  }
  std::sort(order_.begin(), order_.end(), likelier);
}

void Sampler::keep_top_p() {
  if (params_.top_p >= 1.0) return;
  weights_.resize(scores_.size());
  double total = 0.0;
  for (std::size_t index = 0; index < scores_.size(); ++index) total += weights_[index] = std::exp(scores_[index]);
  const double wanted = params_.top_p * total;
  std::size_t count = std::min(head_tokens, scores_.size()), kept = 0;
  for (;; count = std::min(8 * count, scores_.size())) {
    order_likeliest(count);
    double mass = 0.0;
    for (kept = 0; kept < count && mass < wanted;) mass += weights_[static_cast<std::size_t>(order_[kept++])];
    if (mass >= wanted || count == scores_.size()) break;
  }
  std::vector<unsigned char> keep(ids_.size(), 0);
  for (std::size_t rank = 0; rank < kept; ++rank) keep[static_cast<std::size_t>(order_[rank])] = 1;
  keep_where([&](std::size_t index) { return keep[index] != 0; });
}

void Sampler::keep_min_p() {
  if (params_.min_p <= 0.0) return;
  keep_where([this](std::size_t index) { return std::exp(scores_[index]) >= params_.min_p; });
}

// Exact in law: a Gumbel on the total mass of a set stands for the greatest over that set, and which
// token attains it is independent of it. So the tokens past the likeliest share one Gumbel.
Token Sampler::draw(std::int64_t position) {
  if (ids_.size() <= head_tokens) return draw_of_all(position);
  order_likeliest(head_tokens);
  std::sort(order_.begin(), order_.end());
  const auto where = static_cast<std::uint64_t>(position);
  double best = -std::numeric_limits<double>::infinity();
  Token winner = 0;
  for (const std::int32_t index : order_) {
    const auto token = ids_[static_cast<std::size_t>(index)];
    const double value = scores_[static_cast<std::size_t>(index)] +
                         gumbel(uniform(params_.seed, where, static_cast<std::uint32_t>(token)));
    if (value > best) best = value, winner = token;
  }
  const Token tail = draw_of_tail(position, best);
  return tail >= 0 ? tail : winner;
}

Token Sampler::draw_of_all(std::int64_t position) const {
  double best = -std::numeric_limits<double>::infinity();
  Token winner = ids_.front();
  for (std::size_t index = 0; index < ids_.size(); ++index) {
    const auto word = static_cast<std::uint32_t>(ids_[index]);
    const double value = scores_[index] + gumbel(uniform(params_.seed, static_cast<std::uint64_t>(position), word));
    if (value > best) best = value, winner = ids_[index];
  }
  return winner;
}

// The tail's token if its shared value beats `least`, else -1. order_ holds the head, ascending.
Token Sampler::draw_of_tail(std::int64_t position, double least) {
  const auto where = static_cast<std::uint64_t>(position);
  weights_.clear();
  double mass = 0.0;
  std::size_t next = 0;
  for (std::size_t index = 0; index < ids_.size(); ++index) {
    if (next < order_.size() && static_cast<std::size_t>(order_[next]) == index) {
      ++next;
      continue;
    }
    mass += std::exp(scores_[index]);
    weights_.push_back(mass);
    ids_[weights_.size() - 1] = ids_[index];  // the tail moves to the front; the head is done with
  }
  if (least >= std::log(mass) + gumbel(uniform(params_.seed, where, tail_word))) return -1;
  const double wanted = uniform(params_.seed, where, pick_word) * mass;
  const auto found = std::upper_bound(weights_.begin(), weights_.end(), wanted);
  const auto index = std::min<std::size_t>(static_cast<std::size_t>(found - weights_.begin()), weights_.size() - 1);
  return ids_[index];
}

namespace {

struct Scored {
  double score;
  Token id;
  float logprob;
};

}  // namespace

void CoupledNoise::order(Candidates& candidates, const std::vector<std::int64_t>& positions) const {
  if (candidates.logprobs.empty()) return;
  std::vector<Scored> row(static_cast<std::size_t>(candidates.top));
  for (std::size_t place = 0, at = 0; place < positions.size(); ++place, at += row.size()) {
    for (std::size_t rank = 0; rank < row.size(); ++rank) {
      const Token id = candidates.ids[at + rank];
      const auto word = static_cast<std::uint32_t>(std::max<Token>(id, 0));
      const double noise = gumbel(uniform(seed, static_cast<std::uint64_t>(positions[place] + skipped), word));
      const float logprob = candidates.logprobs[at + rank];
      row[rank] = {id < 0 ? -std::numeric_limits<double>::infinity() : logprob / temperature + noise, id, logprob};
    }
    std::stable_sort(row.begin(), row.end(), [](const Scored& a, const Scored& b) { return a.score > b.score; });
    for (std::size_t rank = 0; rank < row.size(); ++rank)
      candidates.ids[at + rank] = row[rank].id, candidates.logprobs[at + rank] = row[rank].logprob;
  }
}

}  // namespace mirror
