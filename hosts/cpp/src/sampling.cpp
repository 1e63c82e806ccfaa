#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "error.hpp"
#include "kernels/choice.h"
#include "kernels/noise.hpp"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace mirror {
namespace {

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
  const float* row = seen_.empty() ? logits : penalised(logits);
  const mirror_law law{params_.temperature, params_.top_p, params_.min_p, params_.top_k, params_.seed};
  const std::int64_t token = mirror_choose(row, vocab_size_, &law, position);
  if (token < 0) check_finite(row[argmax(row, vocab_size_)]);
  return static_cast<Token>(token);
}

void Sampler::check_likeliest(float logit) { check_finite(logit); }

void Sampler::refuse_likeliest() { refuse("no finite number"); }

Token Sampler::choose_greedy(const float* logits) {
  const float* row = seen_.empty() ? logits : penalised(logits);
  const int token = argmax(row, vocab_size_);
  check_finite(row[token]);
  return token;
}

const float* Sampler::penalised(const float* logits) {
  lowered_.assign(logits, logits + vocab_size_);
  const auto penalty = static_cast<float>(params_.repetition_penalty);
  for (std::size_t token = 0; token < seen_.size(); ++token)
    if (seen_[token]) lowered_[token] = logits[token] < 0 ? logits[token] * penalty : logits[token] / penalty;
  return lowered_.data();
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
