#include "choice.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "noise.hpp"

namespace mirror {
namespace {

constexpr std::size_t kHead = 256;  // kept tokens with a Gumbel of their own; the others share one
constexpr int kBlock = 32;          // logits whose greatest is looked at first
constexpr double kClose = 1e-6;     // of the greater of two logits: closer ones may have equal scores in float64
constexpr double kSlack32 = 1e-5;   // more than float32 gets wrong in a sum of exponentials, as a share of it
constexpr double kSlack64 = 1e-9;   // the same of float64
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// exp(x) for x <= 0, to 4e-6 of it as far as it matters in a sum; written so that compilers make vectors of it.
inline float near_exp(float x) {
  const float power = (x > -87.0f ? x : -87.0f) * 1.44269504f;
  const int whole = static_cast<int>(power - 0.5f);  // the nearest, since power is 0 or less
  const float rest = power - static_cast<float>(whole);
  float result = 1.3333558e-3f * rest + 9.6181291e-3f;  // of 2^rest, by its derivatives at 0
  result = result * rest + 5.5504109e-2f;
  result = result * rest + 0.24022651f;
  result = result * rest + 0.69314718f;
  result = result * rest + 1.0f;
  const std::int32_t bits = (whole + 127) * (1 << 23);
  float power_of_two;
  std::memcpy(&power_of_two, &bits, sizeof power_of_two);
  return result * power_of_two;
}

// Compiled for two kinds of CPU where the compiler can choose between them at run time.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MIRROR_FOR_AVX2_TOO __attribute__((target_clones("avx2", "default")))
#else
#define MIRROR_FOR_AVX2_TOO
#endif

// Writes the greatest of each block, which is every `blocks`-th value from the block's number on: maxima go down
// columns, so that compilers make vectors of them. Returns whether there is a NaN.
MIRROR_FOR_AVX2_TOO bool block_maxima(const float* values, int blocks, float* maxima) {
  std::memcpy(maxima, values, static_cast<std::size_t>(blocks) * sizeof(float));
  int odd = 0;
  for (int row = 0; row < kBlock; ++row)
    for (int block = 0; block < blocks; ++block) {
      const float value = values[row * blocks + block];
      odd |= value != value;
      maxima[block] = value > maxima[block] ? value : maxima[block];
    }
  return odd != 0;
}

// The sum of exp((min(value, limit) - greatest) * scale), to 4e-6 of it as far as it matters.
MIRROR_FOR_AVX2_TOO double near_mass(const float* values, int count, float limit, float greatest, float scale) {
  constexpr int some = 256;
  double sum = 0;
  for (int start = 0; start < count; start += some) {
    const int here = std::min(some, count - start);
    float weights[some];
    for (int index = 0; index < here; ++index) {
      const float value = values[start + index];
      weights[index] = near_exp(((value < limit ? value : limit) - greatest) * scale);
    }
    for (int index = here; index < some; ++index) weights[index] = 0;
    for (int half = some / 2; half > 0; half /= 2)
      for (int index = 0; index < half; ++index) weights[index] += weights[index + half];
    sum += weights[0];
  }
  return sum;
}

// What is left of a row, by ascending id; scores are log weights, the greatest is 0.
struct Kept {
  std::vector<std::int32_t> ids;
  std::vector<double> scores;

  std::size_t size() const { return ids.size(); }

  template <typename Keep>
  void keep_where(Keep keep) {
    std::size_t kept = 0;
    for (std::size_t index = 0; index < size(); ++index)
      if (keep(index)) {
        ids[kept] = ids[index];
        scores[kept++] = scores[index];
      }
    ids.resize(kept);
    scores.resize(kept);
  }
};

class Row {
 public:
  Row(const float* logits, int count, double temperature) : logits_(logits), count_(count), temperature_(temperature) {
    blocks_ = count / kBlock;
    maxima_.resize(static_cast<std::size_t>(count - blocks_ * (kBlock - 1)));
    bool odd = blocks_ > 0 && block_maxima(logits, blocks_, maxima_.data());
    // What is past the last block stands for itself.
    for (int token = blocks_ * kBlock; token < count; ++token) {
      odd |= std::isnan(logits[token]);
      maxima_[static_cast<std::size_t>(token - blocks_ * (kBlock - 1))] = logits[token];
    }
    greatest_ = odd ? std::numeric_limits<float>::quiet_NaN() : *std::max_element(maxima_.begin(), maxima_.end());
  }

  float greatest() const { return greatest_; }
  std::size_t size() const { return static_cast<std::size_t>(count_); }

  // Whether different logits divided by the temperature still differ, and float32 says something of scores.
  bool is_tame() const { return 1e-6 <= temperature_ && temperature_ <= 1e6; }

  // Whether the greatest so many are found faster than by looking at the whole row.
  bool finds(std::size_t most) const { return is_tame() && maxima_.size() >= 2 * most; }

  // All tokens among the `most` greatest scores, those that tie with the last too; the whole row where it is as well.
  Kept best(std::size_t most) const {
    if (!finds(most)) return all();
    std::vector<float> ranked(maxima_);
    // Greatest of pairs of blocks do as well, where there are enough: half as many to search.
    if (ranked.size() >= 4 * most) {
      for (std::size_t pair = 0; pair < ranked.size() / 2; ++pair)
        ranked[pair] = std::max(maxima_[2 * pair], maxima_[2 * pair + 1]);
      ranked.resize(ranked.size() / 2);
    }
    std::nth_element(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(most - 1), ranked.end(),
                     std::greater<>());
    return from(ranked[most - 1]);
  }

  // All tokens at least `share` times as likely as the likeliest.
  Kept at_least(double share) const { return from(greatest_ + temperature_ * std::log(share)); }

  Kept all() const {
    Kept kept;
    kept.ids.resize(static_cast<std::size_t>(count_));
    std::iota(kept.ids.begin(), kept.ids.end(), 0);
    score(kept);
    return kept;
  }

  // The scores of all tokens, also of those at -infinity.
  std::vector<double> scores() const {
    std::vector<double> result(static_cast<std::size_t>(count_));
    for (int token = 0; token < count_; ++token) result[static_cast<std::size_t>(token)] = scaled(token);
    less_greatest(result);
    return result;
  }

  // The sum of all weights, to within kSlack32 of it.
  double mass() const {
    return near_mass(logits_, count_, kInfinity, greatest_, static_cast<float>(1.0 / temperature_));
  }

  // More than the weights of all tokens whose logit is at most this one.
  double mass_below(float logit) const {
    const auto blocks = static_cast<int>(maxima_.size());
    const float scale = static_cast<float>(1.0 / temperature_);
    return kBlock * near_mass(maxima_.data(), blocks, logit, greatest_, scale) * (1 + kSlack32);
  }

 private:
  double scaled(int token) const {
    const double logit = logits_[token];
    return temperature_ == 1.0 ? logit : logit / temperature_;
  }

  static void less_greatest(std::vector<double>& scores) {
    const double most = *std::max_element(scores.begin(), scores.end());
    for (double& score : scores) score -= most;
  }

  void score(Kept& kept) const {
    kept.scores.resize(kept.ids.size());
    for (std::size_t index = 0; index < kept.ids.size(); ++index) kept.scores[index] = scaled(kept.ids[index]);
    less_greatest(kept.scores);
    kept.keep_where([&](std::size_t index) { return kept.scores[index] > -std::numeric_limits<double>::infinity(); });
  }

  Kept from(double logit) const {
    if (!is_tame() || !(logit > -std::numeric_limits<double>::infinity())) return all();
    const double close = kClose * (std::abs(logit) + std::abs(static_cast<double>(greatest_)));
    const float least = std::nextafter(static_cast<float>(logit - close), -kInfinity);
    Kept kept;
    const auto high = std::count_if(maxima_.begin(), maxima_.end(), [&](float most) { return most >= least; });
    if (high > blocks_ / 8) {
      for (int token = 0; token < count_; ++token)
        if (logits_[token] >= least) kept.ids.push_back(token);
    } else {
      for (int block = 0; block < blocks_; ++block) {
        if (maxima_[static_cast<std::size_t>(block)] < least) continue;
        for (int token = block; token < blocks_ * kBlock; token += blocks_)
          if (logits_[token] >= least) kept.ids.push_back(token);
      }
      for (int token = blocks_ * kBlock; token < count_; ++token)
        if (logits_[token] >= least) kept.ids.push_back(token);
      std::sort(kept.ids.begin(), kept.ids.end());
    }
    score(kept);
    return kept;
  }

  const float* logits_;
  int count_;
  double temperature_;
  int blocks_ = 0;
  std::vector<float> maxima_;  // of each block, and each value past the last
  float greatest_;
};

double exact_mass(const std::vector<double>& scores) {
  double sum = 0;
  for (const double score : scores) sum += std::exp(score);
  return sum;
}

void keep_top_k(Kept& kept, std::int64_t top_k) {
  if (top_k <= 0 || static_cast<std::uint64_t>(top_k) >= kept.size()) return;
  std::vector<double> ranked(kept.scores);
  const auto last = ranked.begin() + static_cast<std::ptrdiff_t>(top_k - 1);
  std::nth_element(ranked.begin(), last, ranked.end(), std::greater<>());
  const double least = *last;
  kept.keep_where([&](std::size_t index) { return kept.scores[index] >= least; });
}

// A weight such that all tokens below it add up to less than top-p leaves out; 0 for no such.
double negligible(double top_p, double mass, std::size_t count) {
  return top_p < 1.0 - kSlack64 ? (1.0 - top_p) * mass / (2.0 * static_cast<double>(count)) : 0.0;
}

// Scores from the greatest down, and the running sums of their weights, as far as these reach a sum.
struct Ranked {
  std::vector<double> scores, reached;

  Ranked(const Kept& kept, double wanted) : scores(kept.scores) {
    for (std::size_t count = kHead;; count *= 8) {
      count = std::min(count, scores.size());
      const auto end = scores.begin() + static_cast<std::ptrdiff_t>(count);
      if (count < scores.size()) std::nth_element(scores.begin(), end, scores.end(), std::greater<>());
      std::sort(scores.begin(), end, std::greater<>());
      reached.clear();
      double sum = 0;
      for (auto score = scores.begin(); score != end; ++score) reached.push_back(sum += std::exp(*score));
      if (sum >= wanted || count == scores.size()) return;
    }
  }

  std::size_t first(double wanted) const {
    return static_cast<std::size_t>(std::lower_bound(reached.begin(), reached.end(), wanted) - reached.begin());
  }
};

// Keeps the `count` likeliest, ties by lower id.
void keep_first(Kept& kept, const Ranked& ranked, std::size_t count) {
  if (count >= ranked.scores.size()) return;
  const double least = ranked.scores[count - 1];
  const auto above = std::count_if(kept.scores.begin(), kept.scores.end(), [&](double score) { return score > least; });
  std::size_t ties = count - static_cast<std::size_t>(above);
  kept.keep_where([&](std::size_t index) {
    return kept.scores[index] > least || (kept.scores[index] == least && ties > 0 && ties-- > 0);
  });
}

void keep_top_p(Kept& kept, double top_p) {
  if (top_p >= 1.0) return;
  const double mass = exact_mass(kept.scores), share = negligible(top_p, mass, kept.size());
  if (share > 0.0) {
    const double least = std::log(share);
    kept.keep_where([&](std::size_t index) { return kept.scores[index] >= least; });
  }
  const Ranked ranked(kept, top_p * mass);
  keep_first(kept, ranked, ranked.first(top_p * mass) + 1);
}

// What top-p alone keeps, from the likely tokens and the mass of all.
Kept nucleus(const Row& row, double top_p) {
  const double mass = row.is_tame() ? row.mass() : 0.0, share = negligible(top_p, mass, row.size());
  if (share <= 0.0) {
    Kept kept = row.all();
    keep_top_p(kept, top_p);
    return kept;
  }
  const double wanted = top_p * mass, surely = wanted * (1.0 + kSlack32);
  const auto cut = [&](Kept kept, const Ranked& ranked) {
    std::size_t count = ranked.first(wanted * (1.0 - kSlack32));
    // Float32 may leave the last token in doubt.
    if (count != ranked.first(surely)) count = ranked.first(top_p * exact_mass(row.all().scores));
    keep_first(kept, ranked, count + 1);
    return kept;
  };
  // Some hundred tokens mostly do; what is not negligible may be a fifth of the row.
  for (std::size_t most = kHead; row.finds(most) && most <= 8 * kHead; most *= 8) {
    Kept kept = row.best(most);
    const Ranked ranked(kept, surely);
    if (ranked.reached.back() >= surely) return cut(std::move(kept), ranked);
  }
  Kept kept = row.at_least(share);
  const Ranked ranked(kept, surely);
  return cut(std::move(kept), ranked);
}

struct Race {
  std::vector<std::size_t> head;  // places among what was kept, ascending
  std::int32_t token;
  double value, tail_noise, pick;

  // Whether the head wins against a tail whose weights add up to less than this.
  bool is_won(double mass) const { return mass == 0.0 || value > std::log(mass) + tail_noise; }
};

// The likeliest tokens, of equals those with lower ids, run against each other.
Race run(const Kept& kept, std::uint64_t seed, std::uint64_t position) {
  std::vector<std::size_t> order(kept.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  if (order.size() > kHead) {
    const auto likelier = [&](std::size_t a, std::size_t b) {
      return kept.scores[a] != kept.scores[b] ? kept.scores[a] > kept.scores[b] : a < b;
    };
    std::nth_element(order.begin(), order.begin() + kHead, order.end(), likelier);
    order.resize(kHead);
    std::sort(order.begin(), order.end());
  }
  Race race{std::move(order), 0, -std::numeric_limits<double>::infinity(), 0, 0};
  race.token = kept.ids[race.head.front()];
  for (const std::size_t place : race.head) {
    const double value =
        kept.scores[place] + gumbel(uniform(seed, position, static_cast<std::uint32_t>(kept.ids[place])));
    if (value > race.value) race.value = value, race.token = kept.ids[place];
  }
  race.tail_noise = gumbel(uniform(seed, position, tail_word));
  race.pick = uniform(seed, position, pick_word);
  return race;
}

// The place of the tail's token that beats a race's winner, -1 where none does. `scores` are of all tokens, and
// written over; the head's places among them are at -infinity.
std::ptrdiff_t of_tail(const Race& race, std::vector<double>& scores) {
  std::ptrdiff_t last = -1;
  double mass = 0;
  for (std::size_t index = 0; index < scores.size(); ++index) {
    if (scores[index] > -std::numeric_limits<double>::infinity()) {
      last = static_cast<std::ptrdiff_t>(index);
      mass += std::exp(scores[index]);
    }
    scores[index] = mass;
  }
  // A tail so unlikely that its mass is 0, or one of no tokens, never wins.
  if (mass == 0.0 || race.value >= std::log(mass) + race.tail_noise) return -1;
  const auto found = std::upper_bound(scores.begin(), scores.end(), race.pick * mass) - scores.begin();
  return std::min(found, last);
}

// Exact in law: a Gumbel on the total mass of a set stands for the greatest over that set, and which token attains it
// is independent of it. So the tokens past the likeliest share one Gumbel.
std::int32_t draw(Kept kept, std::uint64_t seed, std::uint64_t position) {
  const Race race = run(kept, seed, position);
  if (kept.size() <= kHead) return race.token;
  for (const std::size_t place : race.head) kept.scores[place] = -std::numeric_limits<double>::infinity();
  const std::ptrdiff_t place = of_tail(race, kept.scores);
  return place < 0 ? race.token : kept.ids[static_cast<std::size_t>(place)];
}

// Where nothing is dropped the head alone is computed, as long as the tail can't win.
std::int32_t draw_of_all(const Row& row, const float* logits, std::uint64_t seed, std::uint64_t position) {
  const Kept kept = row.best(kHead);
  const Race race = run(kept, seed, position);
  if (row.is_tame()) {
    float least = kInfinity;
    double head = 0;
    for (const std::size_t place : race.head) {
      least = std::min(least, logits[kept.ids[place]]);
      head += std::exp(kept.scores[place]);
    }
    if (race.is_won(row.mass_below(least))) return race.token;
    const double mass = row.mass();
    if (race.is_won(std::max(mass - head, 0.0) + kSlack32 * mass)) return race.token;
  }
  std::vector<double> scores = row.scores();
  for (const std::size_t place : race.head)
    scores[static_cast<std::size_t>(kept.ids[place])] = -std::numeric_limits<double>::infinity();
  const std::ptrdiff_t token = of_tail(race, scores);
  return token < 0 ? race.token : static_cast<std::int32_t>(token);
}

Kept processed(const Row& row, const mirror_law& law) {
  if (law.top_k == 0 && law.top_p < 1.0) return nucleus(row, law.top_p);
  if (law.top_k > 0) {
    Kept kept = row.best(std::min(static_cast<std::size_t>(law.top_k), row.size()));
    keep_top_k(kept, law.top_k);
    keep_top_p(kept, law.top_p);
    return kept;
  }
  return row.at_least(law.min_p);
}

}  // namespace
}  // namespace mirror

int64_t mirror_choose(const float* logits, int32_t count, const mirror_law* law, int64_t position) {
  using namespace mirror;
  const Row row(logits, count, law->temperature);
  if (!std::isfinite(row.greatest())) return -1;
  const auto where = static_cast<std::uint64_t>(position);
  if (law->top_k == 0 && law->top_p >= 1.0 && law->min_p <= 0.0) return draw_of_all(row, logits, law->seed, where);
  Kept kept = processed(row, *law);
  if (law->min_p > 0.0) kept.keep_where([&](std::size_t index) { return std::exp(kept.scores[index]) >= law->min_p; });
  return draw(std::move(kept), law->seed, where);
}
