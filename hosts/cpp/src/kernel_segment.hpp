// A draft's segments on kernels of our own (hosts/kernels), which run a pass in one call, in place of ONNX Runtime.
#pragma once

#include <map>
#include <string>
#include <tuple>

#include "device.hpp"

namespace mirror {

// What MIRROR_KERNELS in the environment says, in small letters; empty where it isn't set.
std::string wanted_kernels();

// What drafts that have a program run with, amx, avx512 or avx2: the best that this CPU has, or what MIRROR_KERNELS in
// the environment names. Null where it says off, or there are no kernels for this CPU.
// Throws Error(device): it names something else, or what isn't here.
const char* chosen_kernels();

class PackedDraft;

// The drafts of one device.
class KernelDrafts {
 public:
  // A draft's segment; null where ONNX Runtime is to run it: it has no program, or one that the kernels don't know, or
  // there are no kernels. Segments of one draft share its weights and its threads, for as long as either lives.
  // Throws Error(bundle), or as chosen_kernels does.
  std::unique_ptr<Segment> load(const std::filesystem::path& folder, const SegmentFacts& facts, const Graph& graph,
                                int capacity, int threads);
  // What a draft that is loaded runs with; null if none is.
  const char* in_use() const;

 private:
  using Key = std::tuple<std::filesystem::path, std::string, int>;

  std::map<Key, std::weak_ptr<const PackedDraft>> packed_;  // by folder, program and threads
};

}  // namespace mirror
