// How much memory a bundle's segments take, and whether a device has it. Reads graph files, no weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "device.hpp"
#include "manifest.hpp"

namespace mirror {

// What one segment takes on its device; activations come on top.
struct SegmentMemory {
  std::string name;
  std::uint64_t weight_bytes = 0, cache_bytes = 0;

  std::uint64_t bytes() const { return weight_bytes + cache_bytes; }
};

// The segments of one device, and what it has left.
struct MemoryNeed {
  FreeMemory free;
  std::vector<SegmentMemory> segments;
};

// The bytes of all weights that an ONNX file holds or refers to. Throws Error(bundle) if it isn't one.
std::uint64_t weight_bytes(const std::filesystem::path& path);

// The bytes of one slot of a cache: a key and a value in each of its layers.
std::uint64_t slot_bytes(const std::vector<LayerKV>& layers);

// In one cache form, the cache having `capacity` slots; no weights for a missing graph.
SegmentMemory segment_memory(const std::filesystem::path& folder, const SegmentFacts& facts, Form form, int capacity);

// Refuses segments that can't fit where they are to run, devices that share a memory added up.
// Throws Error(device) with the figures.
void check_room(const std::vector<MemoryNeed>& needs);

// What this process may still allocate, a container's limit included; nothing where nobody says.
std::optional<std::uint64_t> host_free_bytes();

}  // namespace mirror
