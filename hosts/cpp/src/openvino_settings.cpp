#include "openvino_settings.hpp"

#include <algorithm>

#include "error.hpp"

namespace mirror {
namespace {

// The fewest threads that OpenVINO may compile for. On matrix units it gives each part of a gated MLP in 16 bits half
// the threads: compiled for one thread, it divides by zero, which ends the process (openvinotoolkit/openvino issue
// 33300).
int least_threads(const std::string& unit, const std::string& precision, const CpuFacts& cpu) {
  return unit == "CPU" && precision != "f32" && cpu.amx ? 2 : 1;
}

}  // namespace

// Left alone OpenVINO computes float32 in bfloat16 on a CPU that can: that would change a target's text, and no text
// depends on a draft's arithmetic.
std::string openvino_precision(const std::string& unit, const std::string& asked, Role role, const CpuFacts& cpu) {
  std::string precision = asked;
  if (asked.empty() && unit != "CPU") precision = "f16";
  if (asked.empty() && unit == "CPU" && role == Role::target) precision = "f32";
  const int needed = least_threads(unit, precision, cpu);
  if (cpu.cpus >= needed) return precision;
  if (asked.empty()) return "f32";
  throw Error(ErrorKind::device, "openvino:CPU:" + asked + " needs " + std::to_string(needed) +
                                     " threads on this CPU, which has matrix units, and OpenVINO may use " +
                                     std::to_string(cpu.cpus) + "; allow this process " + std::to_string(needed) +
                                     " CPUs, or ask for openvino:CPU:f32");
}

std::string openvino_settings(const std::string& unit, const std::string& precision, int threads, const CpuFacts& cpu) {
  const std::string kind = unit.substr(0, unit.find('.'));
  std::string text = "{\"" + kind + "\": {\"PERFORMANCE_HINT\": \"LATENCY\"";
  if (!precision.empty()) text += ", \"INFERENCE_PRECISION_HINT\": \"" + precision + "\"";
  if (kind != "NPU") text += ", \"NUM_STREAMS\": \"1\"";
  if (kind == "CPU") {
    const int least = least_threads(unit, precision, cpu);
    text += ", \"INFERENCE_NUM_THREADS\": \"" + std::to_string(std::max(threads, least)) + "\"";
    // They may be one core's; for low latency OpenVINO would then take but one of them.
    if (least > 1 && least == cpu.cpus) text += ", \"ENABLE_HYPER_THREADING\": \"YES\"";
    // Pinned threads would stay on cores that the target's threads are using.
    text += ", \"ENABLE_CPU_PINNING\": \"NO\"";
  }
  return text + "}}";
}

}  // namespace mirror
