// A device over one execution provider: sessions that take any shape and write the cache in place, or one session
// compiled for each shape.
#pragma once

#include <functional>

#include "ort_session.hpp"

namespace mirror {

class SessionDevice : public Device {
 public:
  // Sets what a segment's sessions need besides session_options. Owns what it captures: segments keep it.
  using Configure = std::function<void(Ort::SessionOptions&, const SegmentFacts&, int threads, int capacity)>;

  SessionDevice(Provider provider, Configure configure)
      : provider_(std::move(provider)), configure_(std::move(configure)) {}

  const std::string& name() const override { return provider_.device; }
  Form form() const override { return provider_.form; }
  bool int8_drafts() const override { return provider_.int8_drafts; }
  FreeMemory free_memory() const override {
    return provider_.free_memory ? provider_.free_memory() : host_memory_left();
  }
  int padded_width() const override { return provider_.padded_width; }
  std::vector<std::string> notices() const override {
    return provider_.notices ? *provider_.notices : std::vector<std::string>();
  }
  int recorded_passes() const override { return provider_.stream ? provider_.stream->recorded.load() : 0; }

  // Its segment may outlive it.
  std::unique_ptr<Segment> load_segment(const std::filesystem::path& folder, const SegmentFacts& facts, int capacity,
                                        const std::vector<PassShape>& shapes, const std::vector<PassShape>& later,
                                        int threads) override;

 private:
  Provider provider_;
  Configure configure_;
};

}  // namespace mirror
