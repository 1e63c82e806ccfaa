// The passes of one model that have been run, bound and ready: one per width, the latest ones kept.
#pragma once

#include <list>
#include <map>
#include <memory>
#include <utility>

namespace mirror {

// Decoding needs one pass per width of a round; prefill's remainders come and go.
template <typename Pass>
class PassPool {
 public:
  // The pass of a width; `make` makes a missing one. Valid until 32 other widths were asked for.
  template <typename Make>
  Pass& at(int width, Make make) {
    for (auto item = passes_.begin(); item != passes_.end(); ++item)
      if (item->first == width) {
        passes_.splice(passes_.begin(), passes_, item);
        return *passes_.front().second;
      }
    passes_.emplace_front(width, make());
    if (passes_.size() > kept) passes_.pop_back();
    return *passes_.front().second;
  }

 private:
  static constexpr std::size_t kept = 32;
  std::list<std::pair<int, std::unique_ptr<Pass>>> passes_;
};

}  // namespace mirror
