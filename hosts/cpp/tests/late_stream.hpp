// A stream for tests, over host memory: what it is told happens, but what goes to the host arrives only when someone
// waits. Until then the host's memory holds what no pass would give. Whoever waits for a mark finds what lies before
// it, or, on a stream that hurries, all that was launched: a device may be anywhere between the two.
#pragma once

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "device_stream.hpp"
#include "error.hpp"
#include "host_memory.hpp"

namespace mirror {

class LateStream final : public DeviceStream {
 public:
  explicit LateStream(bool hurries = false) : hurries_(hurries) {}

  void* handle() const override { return nullptr; }
  // Freeing such memory waits for what copies from it, as CUDA does.
  std::shared_ptr<void> pinned(std::size_t bytes) override {
    const auto memory = zeroed_memory(bytes);
    return {memory.get(), [this, memory](void*) { wait(); }};
  }
  void clear(void* device, std::size_t bytes) override { std::memset(device, 0, bytes); }
  // The copy is made at once, so that what is launched behind it reads it; that nobody writes to its source before it
  // would have been made is checked when someone waits.
  void upload(void* device, const void* host, std::size_t bytes) override {
    std::memcpy(device, host, bytes);
    const auto* first = static_cast<const std::byte*>(host);
    launched_.push_back({nullptr, host, {first, first + bytes}});
  }
  void download(void* host, const void* device, std::size_t bytes) override {
    const auto* first = static_cast<const std::byte*>(device);
    launched_.push_back({host, device, {first, first + bytes}});
    std::memset(host, 0xee, bytes);
  }
  void spread(void* to, std::size_t pitch, const void* from, std::size_t bytes, std::size_t count) override {
    for (std::size_t piece = 0; piece < count; ++piece)
      std::memcpy(static_cast<std::byte*>(to) + piece * pitch, static_cast<const std::byte*>(from) + piece * bytes,
                  bytes);
    ++spreads;
    unread += std::any_of(launched_.begin(), launched_.end(),
                          [from](const Copy& copy) { return copy.to != nullptr && copy.from == from; });
  }
  void wait() override { wait_for(arrived_ + launched_.size()); }
  std::unique_ptr<Mark> mark() override { return std::make_unique<LateMark>(*this); }
  // What lies before the mark has arrived when that comes which is launched from now on.
  void after(Mark& mark) override {
    ++followed;
    static_cast<LateMark&>(mark).arrive();
  }

  // Nothing runs while it is recorded, as on a GPU.
  std::unique_ptr<Recording> record(const std::function<void()>& launch) override {
    ++recorded;
    return std::make_unique<Again>(launch, replayed);
  }

  std::atomic<int> replayed{0}, spreads{0}, followed{0};
  // Whether who waits for one of its marks hears that its device has failed.
  std::atomic<bool> broken{false};
  // Spreads of what was on its way to the host, and had not arrived there.
  std::atomic<int> unread{0};
  // Whether a source was written over before its copy would have been made.
  std::atomic<bool> spoilt{false};

 private:
  struct Copy {
    void* to;
    const void* from;
    std::vector<std::byte> bytes;
  };

  class LateMark final : public Mark {
   public:
    explicit LateMark(LateStream& stream) : stream_(stream) {}
    void renew() override { place_ = stream_.arrived_ + stream_.launched_.size(); }
    void wait() override {
      if (stream_.broken) throw Error(ErrorKind::device, "out of luck");
      arrive();
    }
    void arrive() { stream_.wait_for(place_); }

   private:
    LateStream& stream_;
    std::size_t place_ = 0;
  };

  class Again final : public Recording {
   public:
    Again(std::function<void()> launch, std::atomic<int>& count) : launch_(std::move(launch)), count_(count) {}
    void replay() override {
      ++count_;
      launch_();
    }

   private:
    std::function<void()> launch_;
    std::atomic<int>& count_;
  };

  void wait_for(std::size_t place) {
    if (hurries_ && arrived_ < place) place = arrived_ + launched_.size();
    for (; arrived_ < place; ++arrived_, launched_.pop_front()) {
      const Copy& copy = launched_.front();
      if (copy.to != nullptr)
        std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
      else if (std::memcmp(copy.from, copy.bytes.data(), copy.bytes.size()) != 0)
        spoilt = true;
    }
  }

  const bool hurries_;
  std::deque<Copy> launched_;
  std::size_t arrived_ = 0;
};

}  // namespace mirror
