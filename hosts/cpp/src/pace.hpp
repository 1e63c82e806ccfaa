// How many branches a rollout has time for, learnt from when the last ones ended; as in the Python package's pace.py.
#pragma once

#include <algorithm>
#include <cmath>

namespace mirror {

// The share of a rollout's branches that take part in its passes, so that it ends about when the target does. A late
// rollout keeps the target waiting, which costs more than its last branches are worth; an early one might have prepared
// more.
class BranchPace {
 public:
  // Begins with all of at most so many branches.
  explicit BranchPace(int branches) : least_(std::min(1.0, 8.0 / std::max(branches, 1))) {}

  // How many of some branches the first pass takes.
  int first(int branches) const { return later(1, branches); }

  // How many of the first pass's branches take part in pass `number`, from 0.
  int later(std::size_t number, int branches) const {
    const double count = branches * std::pow(share_, static_cast<double>(number));
    return std::max(1, static_cast<int>(std::ceil(count - 1e-9)));
  }

  // A rollout that took `spent_s` ended so long after its outcome was known, or before if negative.
  void note(double late_s, double spent_s) {
    if (late_s > 0.03 * spent_s)
      share_ = std::max(least_, share_ * 0.9);
    else if (late_s < -0.1 * spent_s)
      share_ = std::min(1.0, share_ * 1.03);
  }

 private:
  double share_ = 1, least_;
};

}  // namespace mirror
