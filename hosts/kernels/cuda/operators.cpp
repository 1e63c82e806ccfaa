#include "operators.h"

#include <mutex>

#include "driver.hpp"
#include "operations.hpp"
#include "operator.hpp"

namespace mirror_gpu {

const Api*& api_of_process() {
  static const Api* api = nullptr;
  return api;
}

}  // namespace mirror_gpu

const char* mirror_operators_missing() {
  const std::string& missing = mirror_gpu::driver_missing();
  return missing.empty() ? nullptr : missing.c_str();
}

void* mirror_operators_register(void* options, const void* api_base) {
  using namespace mirror_gpu;
  const Api* api = static_cast<const ApiBase*>(api_base)->get_api(kApiVersion);
  if (const char* missing = mirror_operators_missing()) return status_of(*api, missing);
  static std::mutex mutex;
  static Handle domain = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  return guarded(*api, [&] {
    if (domain == nullptr) {
      api_of_process() = api;
      Handle made = nullptr;
      // The names of built-in operators: ONNX Runtime takes a session's own before those.
      pass_on(api->call(kCreateCustomOpDomain, "com.microsoft", &made));
      for (const CustomOp* operation : {&products_operation(), &attention_operation()})
        pass_on(api->call(kCustomOpDomainAdd, made, operation));
      domain = made;
    }
    pass_on(api->call(kAddCustomOpDomain, options, domain));
  });
}

#if !defined(MIRROR_KERNELS_STATIC)
void* RegisterCustomOps(void* options, const void* api_base) { return mirror_operators_register(options, api_base); }
#endif
