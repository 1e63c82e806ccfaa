// The target's own choice of a token, from one row of logits. Pure. The law: docs/sampling.md.
#pragma once

#include <cstdint>
#include <vector>

#include "records.hpp"

namespace mirror {

// How a token is chosen. Same meaning and limits as the Python package's arguments.
struct SamplingParams {
  double temperature = 0.0;  // 0 is greedy
  std::int64_t top_k = 0;    // 0 keeps all
  double top_p = 1.0;        // 1 keeps all
  double min_p = 0.0;        // 0 keeps all
  double repetition_penalty = 1.0;
  std::uint64_t seed = 0;

  // Throws Error(request) with the first value that is out of range.
  void check() const;
};

// Chooses tokens of one sequence; remembers which tokens the context holds, if that matters.
class Sampler {
 public:
  Sampler(const SamplingParams& params, int vocab_size, const Tokens& context);

  // The token for an absolute position, from its logits [vocab]. Throws Error(device) if no logit is finite.
  Token choose(const float* logits, std::int64_t position);

  // Whether it takes each row's likeliest token as it is, and so needs none of the logits but that token's.
  bool takes_likeliest() const { return params_.temperature == 0.0 && seen_.empty(); }
  // Throws Error(device) if a likeliest token's logit is not finite.
  static void check_likeliest(float logit);
  // Throws Error(device): a graph named no token as the likeliest, since its logit is no finite number.
  [[noreturn]] static void refuse_likeliest();

  // Notes that the context now holds a token; call it for each token before choosing a later one.
  void see(Token token) {
    if (!seen_.empty()) seen_[static_cast<std::size_t>(token)] = 1;
  }

 private:
  Token choose_greedy(const float* logits);
  // The logits with the penalty applied to the context's tokens, until the next call.
  const float* penalised(const float* logits);

  SamplingParams params_;
  int vocab_size_;
  std::vector<unsigned char> seen_;
  std::vector<float> lowered_;
};

// The target's own noise, for whoever guesses its draws. The target draws argmax(log p + Gumbel noise),
// and that noise is no secret: a draft that adds it to its own scores guesses far more draws, and
// nothing depends on it but how often a guess is right.
struct CoupledNoise {
  std::uint64_t seed;
  double temperature;
  int skipped = 0;  // what to add to a position to make it absolute, for a draft that counts from a later token

  // Orders the candidates of each position by falling score with the noise in it. `positions`: the
  // position of the token that each row is for. Left as they are where there are no odds.
  void order(Candidates& candidates, const std::vector<std::int64_t>& positions) const;
};

// The index of the greatest of `count` values, the lowest one on ties; of a NaN, if there is any.
int argmax(const float* values, int count);

}  // namespace mirror
