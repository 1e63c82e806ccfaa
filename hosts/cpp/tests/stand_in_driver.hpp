// An NVIDIA driver for tests, of one GPU with 132 multiprocessors: it may lack a function, or refuse one.
#pragma once

#include <string>

#include "cuda_driver.hpp"

namespace mirror {

class StandInDriver {
 public:
  explicit StandInDriver(std::string lacking = "", std::string refusing = "") : lacking_(std::move(lacking)) {
    refusing_ = std::move(refusing);
    split_into = parts = streams = last_priority = 0;
  }

  CudaDriver driver() const {
    return CudaDriver([lacking = lacking_](const char* name) { return lacking == name ? nullptr : function(name); });
  }

  // What it was asked for: multiprocessors of the last part, how many parts and streams, the last one's priority.
  inline static int split_into = 0, parts = 0, streams = 0, last_priority = 0;

 private:
  // The driver's CUdevResource, as cuda.h has it since CUDA 12.4.
  struct Resource {
    int kind;
    unsigned char own[92];
    unsigned multiprocessors, least, alignment;
    unsigned char more[36];
  };

  static int result(const char* name) { return refusing_ == name ? 801 : 0; }  // not supported

  static int init(unsigned) { return result("cuInit"); }
  static int count(int* gpus) {
    *gpus = 1;
    return result("cuDeviceGetCount");
  }
  static int device(int* device, int index) {
    *device = 40 + index;
    return result("cuDeviceGet");
  }
  static int resource(int device, Resource* whole, int kind) {
    if (device != 40 || kind != 1) return 1;
    *whole = {kind, {}, 132, 8, 8, {}};
    return result("cuDeviceGetDevResource");
  }
  static int split(Resource* part, unsigned* groups, const Resource* whole, Resource* rest, unsigned flags,
                   unsigned least) {
    if (*groups != 1 || flags != 0 || whole->multiprocessors != 132) return 1;
    split_into = static_cast<int>(least);
    *part = *rest = *whole;
    part->multiprocessors = (least + 7) / 8 * 8;
    rest->multiprocessors = 132 - part->multiprocessors;
    return result("cuDevSmResourceSplitByCount");
  }
  static int describe(void** description, Resource* part, unsigned count) {
    *description = nullptr;
    if (count != 1 || part->multiprocessors == 132) return 1;
    *description = &parts;
    return result("cuDevResourceGenerateDesc");
  }
  static int create(void** context, void* description, int device, unsigned flags) {
    if (description != &parts || device != 40 || flags != 1) return 1;
    if (result("cuGreenCtxCreate") != 0) return 801;
    ++parts;
    *context = &streams;
    return 0;
  }
  static int create_stream(void** stream, void* context, unsigned flags, int priority) {
    if (context != &streams || flags != 1) return 1;
    if (result("cuGreenCtxStreamCreate") != 0) return 801;
    ++streams;
    last_priority = priority;
    *stream = &last_priority;
    return 0;
  }

  template <typename Function>
  static void* address(Function* function) {
    return reinterpret_cast<void*>(function);
  }
  static void* function(const std::string& name) {
    if (name == "cuInit") return address(init);
    if (name == "cuDeviceGetCount") return address(count);
    if (name == "cuDeviceGet") return address(device);
    if (name == "cuDeviceGetDevResource") return address(resource);
    if (name == "cuDevSmResourceSplitByCount") return address(split);
    if (name == "cuDevResourceGenerateDesc") return address(describe);
    if (name == "cuGreenCtxCreate") return address(create);
    if (name == "cuGreenCtxStreamCreate") return address(create_stream);
    return nullptr;
  }

  std::string lacking_;
  inline static std::string refusing_;
};

}  // namespace mirror
