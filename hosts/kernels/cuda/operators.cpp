#include "operators.h"

#include <initializer_list>
#include <mutex>
#include <vector>

#include "driver.hpp"
#include "operations.hpp"
#include "operator.hpp"

namespace mirror_gpu {

const Api*& api_of_process() {
  static const Api* api = nullptr;
  return api;
}

namespace {

Handle domain(const Api& api, const char* name, std::initializer_list<const CustomOp*> operations) {
  Handle made = nullptr;
  pass_on(api.call(kCreateCustomOpDomain, name, &made));
  for (const CustomOp* operation : operations) pass_on(api.call(kCustomOpDomainAdd, made, operation));
  return made;
}

}  // namespace
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
  static std::vector<Handle>& domains = *new std::vector<Handle>;  // for good: ONNX Runtime keeps their addresses
  const std::lock_guard<std::mutex> lock(mutex);
  return guarded(*api, [&] {
    if (domains.empty()) {
      api_of_process() = api;
      domains = {
          // The names of built-in operators: ONNX Runtime takes a session's own before those.
          domain(*api, "com.microsoft", {&products_operation(), &attention_operation()}),
          // The names of functions that a bundle's graphs declare: it takes an operator before those too.
          domain(*api, "mirror",
                 {&gated_products_operation(), &half_products_operation(), &gated_half_products_operation(),
                  &branch_mask_operation(), &stream_embedding_operation()}),
      };
    }
    for (const Handle made : domains) pass_on(api->call(kAddCustomOpDomain, options, made));
    // No function is left to be written out ahead of time. ONNX Runtime would do so for some of its own operators too
    // then, and ask all providers for each node on the way: none but ours has a kernel for nodes as we describe them.
    pass_on(api->call(kAddSessionConfigEntry, options, "session.disable_aot_function_inlining", "1"));
  });
}

#if !defined(MIRROR_KERNELS_STATIC)
void* RegisterCustomOps(void* options, const void* api_base) { return mirror_operators_register(options, api_base); }
#endif
