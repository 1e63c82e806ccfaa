// The order in which a device copies and computes, where it doesn't wait for its own work: whoever reads waits.
// Knows bytes; what CUDA makes of it is in cuda.cpp.
#pragma once

#include <atomic>
#include <cstddef>
#include <functional>
#include <memory>

namespace mirror {

// A place in a stream.
class Mark {
 public:
  virtual ~Mark() = default;
  // Moves it behind all that was launched so far.
  virtual void renew() = 0;
  // Waits until the stream has come to it; at once if it never was renewed.
  virtual void wait() = 0;
};

// A pass as it was launched once: the same kernels on the same memory.
class Recording {
 public:
  virtual ~Recording() = default;
  virtual void replay() = 0;
};

class DeviceStream {
 public:
  virtual ~DeviceStream() = default;
  // Its address, as ONNX Runtime takes it.
  virtual void* handle() const = 0;
  // Whether its work may run on all of its device.
  virtual bool whole() const { return true; }
  // Zeroed host memory that copies go to and from.
  virtual std::shared_ptr<void> pinned(std::size_t bytes) = 0;
  // These only launch; host memory must be pinned, and stay as it is until the stream has come there.
  virtual void clear(void* device, std::size_t bytes) = 0;
  virtual void upload(void* device, const void* host, std::size_t bytes) = 0;
  virtual void download(void* host, const void* device, std::size_t bytes) = 0;
  // Copies pieces within the device's memory, each of `bytes`, from side by side to every `pitch` bytes.
  virtual void spread(void* to, std::size_t pitch, const void* from, std::size_t bytes, std::size_t count) = 0;
  // Waits for all that was launched.
  virtual void wait() = 0;
  virtual std::unique_ptr<Mark> mark() = 0;
  // Lets all that is launched from now on wait for a mark, which may be of another stream of the same kind.
  virtual void after(Mark& mark) = 0;
  // Records what a call launches, without running it; null where that can't be replayed.
  virtual std::unique_ptr<Recording> record(const std::function<void()>& launch) = 0;

  // How many passes were recorded so far.
  std::atomic<int> recorded{0};
};

}  // namespace mirror
