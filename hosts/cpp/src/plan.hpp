// From a bundle and its devices to a target and a draft, ready to run.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device.hpp"
#include "draft.hpp"
#include "generation.hpp"
#include "manifest.hpp"
#include "memory.hpp"
#include "target.hpp"

namespace mirror {

// Choices that hold as long as a bundle is loaded; absent takes the bundle's setting, else the default.
struct EngineOptions {
  std::optional<Mode> mode;                   // else mirror
  std::optional<CandidateSource> candidates;  // else both
  std::optional<int> threads;                 // CPU threads in all; else one per physical core
  std::optional<int> max_length, gamma, kappa;
  std::optional<std::vector<int>> fanout, tokens_per_pass, branches_per_pass, proposal_tokens_per_pass;
  std::optional<int> draft_context;  // tokens of a context's end that the draft reads at most; else all
  std::optional<std::string> target_device, suffix_device, draft_device;
  bool pinned = false;            // every target pass after prefill runs at width gamma + 1
  bool verify_hashes = false;     // sha256 of every file; sizes are always checked
  double draft_timeout_s = 30.0;  // until the draft counts as hung
  int max_ngram_size = 3;

  // Throws Error(request) with the first value that is out of range.
  void check() const;
};

// The devices of a bundle's parts; prefix and exit head are the target's.
struct Placement {
  std::shared_ptr<Device> target, suffix, draft;
};

// The sizes that an engine runs at, after the bundle's and the user's choices are joined.
struct Plan {
  Mode mode;
  CandidateSource source;
  int max_length, gamma;
  std::vector<int> fanout;                    // [gamma + 1]
  std::vector<int> tokens_per_pass;           // of a rollout; at least one
  std::vector<int> branches_per_pass;         // of a rollout; empty for all
  std::vector<int> proposal_tokens_per_pass;  // at least one
  int draft_context;                          // tokens that the draft reads at most; max_length if all
  bool adapt_branches;                        // rollouts may take fewer branches where they end late
  int target_threads, draft_threads;
  bool pinned;
  double draft_timeout_s;
  int max_ngram_size;

  int branches() const;
  // Slots of the draft's cache that no context takes.
  int rollout_slots() const;
  // Slots of the draft's cache, in whole blocks of keys.
  int draft_capacity() const;
  // A whole window fits after the last token but one.
  int target_capacity() const { return max_length + gamma + 1; }
};

// Throws Error(request): a size that the bundle can't serve, or a mode that needs a draft it lacks.
Plan make_plan(const Manifest& manifest, const EngineOptions& options, bool shared_cpu);

// Opens the devices that the user, or else the bundle's settings, name.
Placement open_devices(const Manifest& manifest, const EngineOptions& options);

// What each device is to hold: every segment's weights and cache.
std::vector<MemoryNeed> memory_needs(const std::filesystem::path& folder, const Manifest& manifest, const Plan& plan,
                                     const Placement& places);

RoundShape round_shape(const Manifest& manifest, const Plan& plan, std::optional<int> most);

std::unique_ptr<Target> load_target(const std::filesystem::path& folder, const Manifest& manifest, const Plan& plan,
                                    const Placement& places);

// Throws Error(bundle) if the bundle has no draft of a kind that this version runs.
std::unique_ptr<Draft> load_draft(const std::filesystem::path& folder, const Manifest& manifest, const Plan& plan,
                                  Device& device);

}  // namespace mirror
