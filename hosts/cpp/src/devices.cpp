// The devices of this machine, by the names that users write.

#include <algorithm>
#include <cctype>
#include <mutex>

#include "error.hpp"
#include "host_memory.hpp"
#include "ort_session.hpp"

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace mirror {
namespace {

const char* const choices = "cpu, cuda:0 (a number), openvino:CPU, openvino:GPU (or GPU.1), openvino:NPU";
const char* const openvino_provider = "OpenVINOExecutionProvider";

struct DeviceName {
  std::string family, unit, precision;
};

std::string changed_case(std::string text, int (*change)(int)) {
  for (char& letter : text) letter = static_cast<char>(change(static_cast<unsigned char>(letter)));
  return text;
}

bool is_number(const std::string& text, std::size_t most_digits) {
  const bool digits = std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isdigit(c) != 0; });
  return digits && !text.empty() && text.size() <= most_digits;
}

bool is_openvino_unit(const std::string& unit) {
  return unit == "CPU" || unit == "NPU" || unit == "GPU" ||
         (unit.rfind("GPU.", 0) == 0 && is_number(unit.substr(4), 2));
}

DeviceName parse_device_name(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char letter : text)
    if (letter == ':')
      parts.emplace_back();
    else
      parts.back() += letter;
  const std::string family = changed_case(parts[0], std::tolower);
  if (family == "cpu" && parts.size() == 1) return {"cpu", "", ""};
  if (family == "cuda" && parts.size() == 2 && is_number(parts[1], 3)) return {"cuda", parts[1], ""};
  if (family == "openvino" && (parts.size() == 2 || parts.size() == 3)) {
    const std::string unit = changed_case(parts[1], std::toupper);
    const std::string precision = parts.size() == 3 ? changed_case(parts[2], std::tolower) : "";
    const bool known = precision == "f32" || precision == "f16" || precision == "bf16";
    if (parts.size() == 3 && !known)
      throw Error(ErrorKind::device,
                  "'" + text + "' asks for precision '" + precision + "'; the choices are f32, f16, bf16");
    if (is_openvino_unit(unit)) return {"openvino", unit, precision};
  }
  throw Error(ErrorKind::device, "no device is called '" + text + "'; the names are " + choices);
}

// Opens a graph's session, or says which device couldn't.
Ort::Session open_session(const std::filesystem::path& path, const Ort::SessionOptions& options,
                          const std::string& device) {
  try {
    return Ort::Session(ort_environment(), path.c_str(), options);
  } catch (const Ort::Exception& error) {
    throw Error(ErrorKind::device, device + " can't load " + path.filename().string() + ": " + error.what());
  }
}

std::vector<int> widths_of(const std::vector<PassShape>& shapes, const std::vector<PassShape>& later) {
  std::set<int> widths;
  for (const PassShape& shape : shapes) widths.insert(shape.width);
  for (const PassShape& shape : later) widths.insert(shape.width);
  return {widths.begin(), widths.end()};
}

// A device whose sessions take any shape and write the cache in place.
class InplaceDevice : public Device {
 public:
  InplaceDevice(Provider provider, std::function<void(Ort::SessionOptions&)> configure)
      : provider_(std::move(provider)), configure_(std::move(configure)) {}

  const std::string& name() const override { return provider_.device; }
  Form form() const override { return provider_.form; }
  FreeMemory free_memory() const override {
    return provider_.on_host() ? host_memory_left() : FreeMemory{name(), provider_.free_bytes()};
  }

  std::unique_ptr<Segment> load_segment(const std::filesystem::path& folder, const SegmentFacts& facts, int capacity,
                                        const std::vector<PassShape>& shapes, const std::vector<PassShape>& later,
                                        int threads) override {
    check_provider();
    const auto open = [this, folder, threads](const Graph& graph, PassShape) {
      Ort::SessionOptions options = session_options(threads);
      configure_(options);
      Ort::Session session = open_session(folder / std::filesystem::u8path(graph.file), options, name());
      check_attention(session, graph);
      return session;
    };
    // On a GPU a width met for the first time costs plans: prompts take the widest, padded.
    return std::make_unique<OrtSegment>(facts, graph_of(facts, provider_.form, name()), provider_, capacity, open,
                                        provider_.on_host() ? std::vector<int>{} : widths_of(shapes, later), shapes);
  }

 private:
  // ONNX Runtime would otherwise go on with the CPU, with only a warning.
  void check_provider() const {
    const std::vector<std::string> offered = Ort::GetAvailableProviders();
    if (std::count(offered.begin(), offered.end(), provider_.name) > 0) return;
    std::string listed;
    for (const std::string& provider : offered) listed += (listed.empty() ? "" : ", ") + provider;
    throw Error(ErrorKind::device, name() + " needs " + provider_.name + ", this onnxruntime offers " + listed +
                                       "; install the build that has it");
  }

  // What a GPU must compute itself: on the CPU it would copy the whole cache there and back in every layer.
  void check_attention(const Ort::Session& session, const Graph& graph) const {
    if (provider_.on_host()) return;
    for (const auto& part : session.GetEpGraphAssignmentInfo()) {
      if (part.GetEpName() == provider_.name) continue;
      for (const auto& node : part.GetNodes())
        if (node.GetOperatorType() == "GroupQueryAttention")
          throw Error(ErrorKind::device, name() + " computes attention in fp16 and bf16, and " + graph.file +
                                             " needs it in float32; export the bundle with --precision fp16, bf16, "
                                             "int8-fp16 or int4-fp16");
    }
  }

  Provider provider_;
  std::function<void(Ort::SessionOptions&)> configure_;
};

// One device of a plugin that compiles for fixed sizes and keeps no cache of its own.
class OpenVinoDevice : public Device {
 public:
  OpenVinoDevice(std::string unit, std::string precision, Ort::ConstEpDevice device)
      : unit_(std::move(unit)), precision_(std::move(precision)), device_(device) {
    provider_.name = openvino_provider;
    provider_.device = "openvino:" + unit_;
    provider_.form = Form::rows;
    provider_.compiles = true;
    // With inputs bound once, drafts on an Intel CPU guessed next to no token right.
    provider_.binds = false;
  }

  const std::string& name() const override { return provider_.device; }
  Form form() const override { return Form::rows; }
  // Nobody says what a GPU of the plugin has left; a CPU and an NPU share the host's memory.
  FreeMemory free_memory() const override {
    return unit_.rfind("GPU", 0) == 0 ? FreeMemory{name(), std::nullopt} : host_memory_left();
  }

  std::unique_ptr<Segment> load_segment(const std::filesystem::path& folder, const SegmentFacts& facts, int capacity,
                                        const std::vector<PassShape>& shapes, const std::vector<PassShape>& later,
                                        int threads) override {
    const auto open = [this, folder, capacity, threads](const Graph& graph, PassShape shape) {
      Ort::SessionOptions options = session_options(threads);
      for (const auto& [dimension, size] :
           {std::pair{"width", shape.width}, std::pair{"rows", shape.rows}, std::pair{"capacity", capacity}})
        options.AddFreeDimensionOverrideByName(dimension, size);
      // Without this, nodes that the plugin leaves out would run on the CPU, unsaid.
      options.AddConfigEntry("session.disable_cpu_ep_fallback", "1");
      options.AppendExecutionProvider_V2(ort_environment(), {device_}, {{"load_config", settings(threads)}});
      return open_session(folder / std::filesystem::u8path(graph.file), options, name());
    };
    return std::make_unique<OrtSegment>(facts, graph_of(facts, Form::rows, name()), provider_, capacity, open,
                                        widths_of(shapes, later), shapes);
  }

 private:
  // OpenVINO's own properties, as JSON by device kind. Left alone it would compute float32 in bfloat16.
  std::string settings(int threads) const {
    const std::string kind = unit_.substr(0, unit_.find('.'));
    const std::string precision = !precision_.empty() ? precision_ : kind == "CPU" ? "f32" : "f16";
    std::string text =
        "{\"" + kind + "\": {\"PERFORMANCE_HINT\": \"LATENCY\", \"INFERENCE_PRECISION_HINT\": \"" + precision + "\"";
    if (kind != "NPU") text += ", \"NUM_STREAMS\": \"1\"";
    if (kind == "CPU")
      text += ", \"INFERENCE_NUM_THREADS\": \"" + std::to_string(threads) + "\", \"ENABLE_CPU_PINNING\": \"NO\"";
    return text + "}}";
  }

  std::string unit_, precision_;
  Ort::ConstEpDevice device_;
  Provider provider_;
};

// The NVIDIA driver, loaded when first asked for: a host without a GPU needs none of it.
class CudaDriver {
 public:
  CudaDriver() {
#ifdef _WIN32
    library_ = LoadLibraryA("nvcuda.dll");
#else
    library_ = dlopen("libcuda.so.1", RTLD_NOW);
#endif
    const auto init = function<int (*)(unsigned)>("cuInit");
    const auto count = function<int (*)(int*)>("cuDeviceGetCount");
    if (init == nullptr || count == nullptr || init(0) != 0 || count(&gpus) != 0) gpus = 0;
  }

  // Clears memory of one GPU.
  void zero(int index, void* data, std::size_t bytes) const {
    const bool done = in_context(index, [&] {
      return function<int (*)(std::uintptr_t, unsigned char, std::size_t)>("cuMemsetD8_v2")(
                 reinterpret_cast<std::uintptr_t>(data), 0, bytes) == 0 &&
             function<int (*)()>("cuCtxSynchronize")() == 0;
    });
    if (!done)
      throw Error(ErrorKind::device, "cuda:" + std::to_string(index) + " could not clear its memory; check its driver");
  }

  std::optional<std::uint64_t> free_bytes(int index) const {
    std::size_t free = 0, total = 0;
    const auto ask = function<int (*)(std::size_t*, std::size_t*)>("cuMemGetInfo_v2");
    if (!in_context(index, [&] { return ask != nullptr && ask(&free, &total) == 0; })) return std::nullopt;
    return free;
  }

  int gpus = 0;

 private:
  // Works in the context of one GPU that ONNX Runtime uses too. It is kept: letting it go would tear down
  // what sessions are about to make again.
  template <typename Work>
  bool in_context(int index, Work work) const {
    int device = 0;
    void* context = nullptr;
    if (gpus == 0 || function<int (*)(int*, int)>("cuDeviceGet")(&device, index) != 0 ||
        function<int (*)(void**, int)>("cuDevicePrimaryCtxRetain")(&context, device) != 0 ||
        function<int (*)(void*)>("cuCtxPushCurrent_v2")(context) != 0)
      return false;
    const bool done = work();
    function<int (*)(void**)>("cuCtxPopCurrent_v2")(&context);
    return done;
  }

  template <typename Function>
  Function function(const char* name) const {
    if (library_ == nullptr) return nullptr;
#ifdef _WIN32
    return reinterpret_cast<Function>(GetProcAddress(static_cast<HMODULE>(library_), name));
#else
    return reinterpret_cast<Function>(dlsym(library_, name));
#endif
  }

  void* library_ = nullptr;
};

const CudaDriver& cuda_driver() {
  static const CudaDriver driver;
  return driver;
}

std::shared_ptr<Device> open_cpu() {
  Provider provider;
  provider.name = "CPUExecutionProvider";
  return std::make_shared<InplaceDevice>(provider, share_host_memory);
}

std::shared_ptr<Device> open_cuda(int index) {
  Provider provider;
  provider.name = "CUDAExecutionProvider";
  provider.device = "cuda:" + std::to_string(index);
  provider.memory = "Cuda";
  provider.index = index;
  // GroupQueryAttention chooses its kernel by it, and builds a new plan for every new number.
  provider.sized_inputs = {"total_sequence_length"};
  provider.zero = [index](void* data, std::size_t bytes) { cuda_driver().zero(index, data, bytes); };
  provider.free_bytes = [index] { return cuda_driver().free_bytes(index); };
  const auto configure = [index](Ort::SessionOptions& options) {
    ort_environment();  // the provider's library logs through it as soon as it is loaded
    Ort::CUDAProviderOptions cuda;
    // TF32 keeps 10 bits of a mantissa: greedy tokens would differ. The default arena doubles at each growth.
    cuda.Update(
        {{"device_id", std::to_string(index)}, {"use_tf32", "0"}, {"arena_extend_strategy", "kSameAsRequested"}});
    options.AppendExecutionProvider_CUDA_V2(*cuda);
    options.AddConfigEntry("session.record_ep_graph_assignment_info", "1");  // tells afterwards what runs where
  };
  const std::vector<std::string> offered = Ort::GetAvailableProviders();
  if (std::count(offered.begin(), offered.end(), provider.name) > 0 && index >= cuda_driver().gpus)
    throw Error(ErrorKind::device, provider.device + " isn't there: the NVIDIA driver lists " +
                                       std::to_string(cuda_driver().gpus) +
                                       " GPUs; use another one, or install the driver");
  return std::make_shared<InplaceDevice>(provider, configure);
}

std::shared_ptr<Device> open_openvino(const DeviceName& name) {
  std::string seen;
  for (const Ort::ConstEpDevice& device : ort_environment().GetEpDevices()) {
    if (std::string(device.EpName()) != openvino_provider) continue;
    const char* unit = device.EpMetadata().GetValue("ov_device");
    if (unit != nullptr && name.unit == unit)
      return std::make_shared<OpenVinoDevice>(name.unit, name.precision, device);
    seen += (seen.empty() ? "" : ", ") + std::string(unit == nullptr ? "?" : unit);
  }
  if (seen.empty())
    throw Error(ErrorKind::device,
                "openvino:" + name.unit +
                    " isn't there: no OpenVINO plugin lists a device; register its library "
                    "(mirror_register_provider_library), and note that it lists Intel hardware only");
  throw Error(ErrorKind::device,
              "openvino:" + name.unit + " isn't there: the plugin lists " + seen + "; use one of these");
}

}  // namespace

std::shared_ptr<Device> open_device(const std::string& name) {
  const DeviceName parsed = parse_device_name(name);
  if (parsed.family == "cpu") return open_cpu();
  if (parsed.family == "cuda") return open_cuda(std::stoi(parsed.unit));
  return open_openvino(parsed);
}

void register_provider_library(const std::string& name, const std::filesystem::path& path) {
  static std::mutex mutex;
  static std::set<std::string> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (known.count(name) > 0) return;
  try {
    ort_environment().RegisterExecutionProviderLibrary(name.c_str(), path.native());
  } catch (const Ort::Exception& error) {
    throw Error(ErrorKind::device, "the provider library " + path.string() + " can't be registered: " + error.what());
  }
  known.insert(name);
}

}  // namespace mirror
