// The NVIDIA driver, for what the CUDA runtime doesn't offer: the GPUs before there is a runtime, and streams whose
// kernels keep to a part of a GPU. The parts are the driver's green contexts (CUDA 12.4 and later): a kernel on such a
// stream runs on its own multiprocessors alone; the GPU's memory, and whatever else the process does with it, stay as
// they are.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

namespace mirror {

class CudaDriver {
 public:
  // The driver's function of a name, null if it has none.
  using Lookup = std::function<void*(const char* name)>;

  explicit CudaDriver(Lookup lookup);

  // How many GPUs it lists; 0 without a driver.
  int gpus() const { return gpus_; }

  // What a GPU's memory has left, nothing where the driver doesn't say.
  std::optional<std::uint64_t> free_bytes(int index) const;

  // A new stream whose kernels run on about a share of a GPU's multiprocessors: the driver rounds up to what it can
  // give. Null where it has no parts or refuses. The calling thread's context must be the GPU's own already.
  void* part_stream(int index, double share, int priority);

 private:
  void* make_part(int index, double share) const;

  Lookup lookup_;
  int gpus_ = 0;
  std::mutex mutex_;
  // By GPU and share. Kept as long as the process: what was recorded on a part's stream may outlive the stream.
  std::map<std::pair<int, double>, void*> parts_;
};

// This machine's, looked for when first needed.
CudaDriver& cuda_driver();

}  // namespace mirror
