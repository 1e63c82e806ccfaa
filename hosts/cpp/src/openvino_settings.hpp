// What OpenVINO is told to do through ONNX Runtime's plugin.
#pragma once

#include <string>

#include "cores.hpp"
#include "device.hpp"

namespace mirror {

// What it depends on of this machine.
struct CpuFacts {
  int cpus = allowed_cpus();
  bool amx = may_have_amx();
};

// What a unit (CPU, GPU.1, NPU) computes in, f32 or such; empty for OpenVINO's own choice. `asked`: what the device's
// name says, empty for nothing. Throws Error(device): that needs more threads than there are CPUs.
std::string openvino_precision(const std::string& unit, const std::string& asked, Role role, const CpuFacts& cpu);

// OpenVINO's properties, as JSON by kind of device. A CPU gets more threads where OpenVINO can't do with so few.
std::string openvino_settings(const std::string& unit, const std::string& precision, int threads, const CpuFacts& cpu);

}  // namespace mirror
