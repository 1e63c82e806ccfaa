#include "cores.hpp"

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

namespace mirror {
namespace {

// By their numbers; none where nobody tells them.
std::vector<int> numbers_of_allowed_cpus() {
  std::vector<int> numbers;
#ifdef __linux__
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &allowed)) numbers.push_back(cpu);
#endif
  return numbers;
}

int all_cpus() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

// Whether the CPU has one of these features, or nobody says that it hasn't.
bool may_have(const std::vector<std::string>& features) {
  std::ifstream file("/proc/cpuinfo");
  bool told = false;
  for (std::string line; std::getline(file, line); told = true)
    for (const std::string& feature : features)
      if (line.find(feature) != std::string::npos) return true;
  return !told;
}

}  // namespace

int allowed_cpus() {
  const std::size_t count = numbers_of_allowed_cpus().size();
  return count > 0 ? static_cast<int>(count) : all_cpus();
}

int physical_cores() {
  std::set<std::string> cores;
  for (const int cpu : numbers_of_allowed_cpus()) {
    std::ifstream file("/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/thread_siblings_list");
    std::string siblings;
    cores.insert(std::getline(file, siblings) ? siblings : std::to_string(cpu));
  }
  return cores.empty() ? all_cpus() : static_cast<int>(cores.size());
}

bool may_have_amx() {
  static const bool found = may_have({"amx_tile"});
  return found;
}

bool may_have_vnni() {
  static const bool found = may_have({"avx_vnni", "avx512_vnni"});
  return found;
}

}  // namespace mirror
