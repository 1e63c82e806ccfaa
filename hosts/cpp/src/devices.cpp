// The devices of this machine, by the names that users write.

#include <algorithm>
#include <cctype>
#include <mutex>
#include <set>

#include "cores.hpp"
#include "cuda.hpp"
#include "cuda_driver.hpp"
#include "error.hpp"
#include "gpu_operators.hpp"
#include "host_memory.hpp"
#include "kernel_segment.hpp"
#include "openvino_settings.hpp"
#include "session_device.hpp"

namespace mirror {
namespace {

const char* const choices = "cpu, cuda:0 (a number), openvino:CPU, openvino:GPU (or GPU.1), openvino:NPU";
const char* const openvino_provider = "OpenVINOExecutionProvider";

struct DeviceName {
  std::string family, unit, precision;
  double share = 1.0;  // of a GPU's multiprocessors

  // What a device by that name calls itself.
  std::string device() const { return unit.empty() ? family : family + ":" + unit; }
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

// The part of a GPU that `cuda:0:0.25` asks for: up to three digits behind a point.
double share_of(const std::string& name, const std::string& share) {
  const std::size_t point = share.find('.');
  const bool known = (point == 0 || (point == 1 && share[0] == '0')) && is_number(share.substr(point + 1), 3);
  // Digit by digit: how `stod` reads a point depends on the process's locale.
  double part = 0.0, place = 0.1;
  for (std::size_t index = point + 1; known && index < share.size(); ++index, place /= 10.0)
    part += (share[index] - '0') * place;
  if (part == 0.0)
    throw Error(ErrorKind::device, "'" + name + "' asks for '" + share +
                                       "' of a GPU; write a part above 0 and below 1, as in cuda:0:0.25");
  return part;
}

DeviceName parse_device_name(const std::string& text) {
  std::vector<std::string> parts(1);
  for (const char letter : text)
    if (letter == ':')
      parts.emplace_back();
    else
      parts.back() += letter;
  const std::string family = changed_case(parts[0], std::tolower);
  if (family == "cpu" && parts.size() == 1) return {"cpu", "", "", 1.0};
  if (family == "cuda" && (parts.size() == 2 || parts.size() == 3) && is_number(parts[1], 3))
    return {"cuda", std::to_string(std::stoi(parts[1])), "", parts.size() == 3 ? share_of(text, parts[2]) : 1.0};
  if (family == "openvino" && (parts.size() == 2 || parts.size() == 3)) {
    const std::string unit = changed_case(parts[1], std::toupper);
    const std::string precision = parts.size() == 3 ? changed_case(parts[2], std::tolower) : "";
    const bool known = precision == "f32" || precision == "f16" || precision == "bf16";
    if (parts.size() == 3 && !known)
      throw Error(ErrorKind::device,
                  "'" + text + "' asks for precision '" + precision + "'; the choices are f32, f16, bf16");
    if (unit == "NPU" && !precision.empty() && precision != "f16")
      throw Error(ErrorKind::device,
                  "openvino:NPU computes in f16 only, asked for " + precision + "; leave the precision out");
    if (is_openvino_unit(unit)) return {"openvino", unit, precision, 1.0};
  }
  throw Error(ErrorKind::device, "no device is called '" + text + "'; the names are " + choices);
}

// ONNX Runtime would otherwise go on with the CPU, with only a warning.
void require(const Provider& provider) {
  const std::vector<std::string> offered = Ort::GetAvailableProviders();
  if (std::count(offered.begin(), offered.end(), provider.name) > 0) return;
  std::string listed;
  for (const std::string& name : offered) listed += (listed.empty() ? "" : ", ") + name;
  throw Error(ErrorKind::device, provider.device + " needs " + provider.name + ", this onnxruntime offers " + listed +
                                     "; install the build that has it");
}

// ONNX Runtime, and for drafts that our own kernels know, these.
class CpuDevice final : public SessionDevice {
 public:
  using SessionDevice::SessionDevice;

  bool runs_programs() const override { return chosen_kernels() != nullptr; }
  const char* draft_kernels() const override { return drafts_.in_use(); }
  std::unique_ptr<Segment> load_segment(const std::filesystem::path& folder, const SegmentFacts& facts, int capacity,
                                        const std::vector<PassShape>& shapes, const std::vector<PassShape>& later,
                                        int threads) override {
    auto segment = drafts_.load(folder, facts, graph_of(facts, form(), name()), capacity, threads);
    return segment ? std::move(segment) : SessionDevice::load_segment(folder, facts, capacity, shapes, later, threads);
  }

 private:
  KernelDrafts drafts_;
};

std::shared_ptr<Device> open_cpu() {
  Provider provider;
  provider.name = "CPUExecutionProvider";
  provider.int8_drafts = true;
  return std::make_shared<CpuDevice>(provider, [](Ort::SessionOptions& options, const SegmentFacts&, int, int) {
    share_host_memory(options);
    // Sums of two 8-bit products would overflow 16 bits. The way around takes 1.6 times as long.
    if (!may_have_vnni()) options.AddConfigEntry("session.x64quantprecision", "1");
  });
}

// A cache of as many slots is attended to by flash attention, or memory-efficient where that can't be: the time of
// cuDNN's, which ONNX Runtime would take on Hopper, grows the faster with the context. One kernel for all passes of an
// engine: two would round differently.
constexpr int long_capacity = 4096;

void use_cuda(Ort::SessionOptions& options, int index, void* stream, int capacity) {
  Ort::CUDAProviderOptions cuda;
  // TF32 keeps 10 bits of a mantissa: greedy tokens would differ. The default arena doubles at each growth.
  cuda.Update({{"device_id", std::to_string(index)}, {"use_tf32", "0"}, {"arena_extend_strategy", "kSameAsRequested"}});
  if (capacity >= long_capacity) cuda.Update({{"sdpa_kernel", "3"}});
  if (stream != nullptr) cuda.UpdateWithValue("user_compute_stream", stream);
  options.AppendExecutionProvider_CUDA_V2(*cuda);
  options.AddConfigEntry("session.record_ep_graph_assignment_info", "1");  // tells afterwards what runs where
}

// Loads the provider's library, and with it the CUDA runtime that it computes with.
void load_cuda(const Provider& provider) {
  ort_environment();  // the library logs through it as soon as it is loaded
  try {
    Ort::SessionOptions options;
    use_cuda(options, provider.index, nullptr, 0);
  } catch (const Ort::Exception& error) {
    throw Error(ErrorKind::device, provider.device + " isn't there: " + error.what());
  }
}

std::shared_ptr<Device> open_cuda(const DeviceName& name, Role role) {
  const int index = std::stoi(name.unit);
  Provider provider;
  provider.name = "CUDAExecutionProvider";
  provider.device = name.device();
  provider.memory = "Cuda";
  provider.index = index;
  require(provider);
  const int gpus = cuda_driver().gpus();
  if (index >= gpus)
    throw Error(ErrorKind::device, provider.device + " isn't there: the NVIDIA driver lists " + std::to_string(gpus) +
                                       " GPUs; use another one, or install the driver");
  load_cuda(provider);
  // A width met for the first time costs plans and a recording: prompts take the widest, padded.
  provider.fixed_widths = true;
  // GroupQueryAttention chooses its kernel by it.
  provider.sized_total = true;
  provider.stream = open_cuda_stream(index, role != Role::target, name.share);
  provider.free_memory = [name = provider.device, index] { return FreeMemory{name, cuda_driver().free_bytes(index)}; };
  provider.notices = std::make_shared<std::vector<std::string>>();
  if (name.share < 1.0 && provider.stream->whole())
    provider.notices->push_back(provider.device + " has no parts in this driver; draft and target share it whole");
  const auto configure = [index, stream = provider.stream, notices = provider.notices, device = provider.device](
                             Ort::SessionOptions& options, const SegmentFacts& facts, int, int capacity) {
    use_cuda(options, index, stream->handle(), capacity);
    if (takes_operators(facts)) return add_operators(options);
    if (const std::optional<std::string> lack = operators_lack(facts))
      notices->push_back(device + " computes by ONNX Runtime's kernels alone, which take longer: " + *lack);
  };
  return std::make_shared<SessionDevice>(provider, configure);
}

// One device of a plugin that compiles for fixed sizes and keeps no cache of its own.
std::shared_ptr<Device> openvino_device(const DeviceName& name, Role role, Ort::ConstEpDevice device) {
  Provider provider;
  provider.name = openvino_provider;
  provider.device = name.device();
  provider.form = Form::rows;
  provider.compiles = true;
  // An NPU waits for its weights and multiplies in tiles; on a CPU passes in turns over several sessions take longer.
  provider.padded_width = name.unit.rfind("NPU", 0) == 0 ? 64 : 8;
  // With inputs bound once, drafts on an Intel CPU guessed next to no token right.
  provider.binds = false;
  // Nobody says what a GPU of the plugin has left; a CPU and an NPU share the host's memory.
  if (name.unit.rfind("GPU", 0) == 0)
    provider.free_memory = [device = provider.device] { return FreeMemory{device, std::nullopt}; };
  const CpuFacts cpu;
  const std::string precision = openvino_precision(name.unit, name.precision, role, cpu);
  const auto configure = [unit = name.unit, precision, cpu, device](Ort::SessionOptions& options, const SegmentFacts&,
                                                                    int threads, int) {
    // Without this, nodes that the plugin leaves out would run on the CPU, unsaid.
    options.AddConfigEntry("session.disable_cpu_ep_fallback", "1");
    options.AppendExecutionProvider_V2(ort_environment(), {device},
                                       {{"load_config", openvino_settings(unit, precision, threads, cpu)}});
  };
  return std::make_shared<SessionDevice>(provider, configure);
}

std::shared_ptr<Device> open_openvino(const DeviceName& name, Role role) {
  std::string seen;
  for (const Ort::ConstEpDevice& device : ort_environment().GetEpDevices()) {
    if (std::string(device.EpName()) != openvino_provider) continue;
    const char* unit = device.EpMetadata().GetValue("ov_device");
    if (unit != nullptr && name.unit == unit) return openvino_device(name, role, device);
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

std::string device_name(const std::string& name) { return parse_device_name(name).device(); }

std::shared_ptr<Device> open_device(const std::string& name, Role role) {
  const DeviceName parsed = parse_device_name(name);
  if (parsed.family == "cpu") return open_cpu();
  if (parsed.family == "cuda") return open_cuda(parsed, role);
  return open_openvino(parsed, role);
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
