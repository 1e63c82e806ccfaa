// How threads share the steps of a pass. A step is over when all its units of work are done, whoever did them: nobody
// waits for a thread that the system has not let run.
#pragma once

#include <stdint.h>

#include <atomic>

// A function of a header that is compiled for several instruction sets must leave no copy of its own behind, or the
// linker may take one for a caller on another CPU.
#if defined(_MSC_VER)
#define MIRROR_INLINE __forceinline
#else
#define MIRROR_INLINE inline __attribute__((always_inline))
#endif

namespace mirror_kernels {

constexpr int most_steps = 2048;

// A step's units: how many were claimed, how many are done; the number of the pass in the upper halves.
struct alignas(64) Step {
  std::atomic<uint64_t> claimed{0};
  alignas(64) std::atomic<uint64_t> done{0};
};

// A thread's place in one pass. A thread that comes late finds that the pass is over, and leaves without having looked
// at anything but the steps.
class Turn {
 public:
  MIRROR_INLINE Turn(Step* steps, uint32_t pass, int thread, int threads)
      : steps_(steps), pass_(pass), thread_(thread), threads_(threads) {}

  MIRROR_INLINE int thread() const { return thread_; }
  MIRROR_INLINE int threads() const { return threads_; }

  // Takes the step's next unit of `total`; false if there is none.
  MIRROR_INLINE bool claim(int total, int& unit) {
    std::atomic<uint64_t>& claimed = steps_[step_].claimed;
    uint64_t seen = claimed.load(std::memory_order_relaxed);
    do {
      unit = static_cast<int>(static_cast<uint32_t>(seen));
      if (static_cast<uint32_t>(seen >> 32) != pass_ || unit >= total) return false;
    } while (!claimed.compare_exchange_weak(seen, seen + 1, std::memory_order_relaxed));
    return true;
  }

  // Says that a claimed unit is done.
  MIRROR_INLINE void done() { steps_[step_].done.fetch_add(1, std::memory_order_release); }

  // Waits until all units of the step are done, and goes on to the next; false if the pass is over.
  MIRROR_INLINE bool next(int total) {
    std::atomic<uint64_t>& done = steps_[step_].done;
    for (int tries = 0;; tries++) {
      const uint64_t seen = done.load(std::memory_order_acquire);
      if (static_cast<uint32_t>(seen >> 32) != pass_) return false;
      if (static_cast<uint32_t>(seen) >= static_cast<uint32_t>(total)) break;
      rest(tries);
    }
    step_++;
    return true;
  }

 private:
  // Where another program has the core of a thread that is still busy, giving way lets it come there sooner.
  static MIRROR_INLINE void rest(int tries) {
    if (tries < 4000)
      __builtin_ia32_pause();
    else
      give_way();
  }
  static void give_way();

  Step* steps_;
  uint32_t pass_;
  int thread_, threads_, step_ = 0;
};

}  // namespace mirror_kernels
