#include "plan.hpp"

#include <algorithm>
#include <numeric>
#include <set>

#include "cores.hpp"
#include "error.hpp"
#include "lookahead.hpp"
#include "model_draft.hpp"
#include "ngram_draft.hpp"
#include "recent_draft.hpp"

namespace mirror {
namespace {

std::string listed(const std::vector<int>& numbers) {
  std::string text;
  for (const int number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "(" + text + (numbers.size() == 1 ? ",)" : ")");
}

void at_least_one(const char* name, const std::optional<int>& found) {
  if (found && *found < 1)
    throw Error(ErrorKind::request, std::string(name) + " is " + std::to_string(*found) + "; it must be 1 or more");
}

Mode mode_of(const Manifest& manifest, const EngineOptions& options) {
  return options.mode.value_or(manifest.settings.mode.value_or(Mode::mirror));
}

std::string draft_device_of(const Manifest& manifest, const EngineOptions& options) {
  return options.draft_device.value_or(manifest.settings.draft_device.value_or("cpu"));
}

int length_of(const Manifest& manifest, const EngineOptions& options) {
  const int most = manifest.decoding.max_length, length = options.max_length.value_or(most);
  if (length > most)
    throw Error(ErrorKind::request, "max_length is " + std::to_string(length) + " and the bundle was exported for " +
                                        std::to_string(most) +
                                        "; ask for less or export it with a larger --max-length");
  return length;
}

std::vector<int> fanout_of(const Manifest& manifest, const EngineOptions& options, int gamma) {
  const std::size_t positions = static_cast<std::size_t>(gamma) + 1;
  const auto& tuned = manifest.settings.fanout;
  std::vector<int> fanout(positions, options.kappa.value_or(manifest.decoding.kappa));
  if (options.fanout)
    fanout = *options.fanout;
  else if (!options.kappa && tuned && tuned->size() == positions)
    fanout = *tuned;
  if (fanout.size() != positions)
    throw Error(ErrorKind::request, "fanout has " + std::to_string(fanout.size()) + " counts; with gamma " +
                                        std::to_string(gamma) + " it must have " + std::to_string(positions));
  const auto [least, most] = std::minmax_element(fanout.begin(), fanout.end());
  if (*least < 0 || *most < 1)
    throw Error(ErrorKind::request,
                "fanout is " + listed(fanout) + "; its counts must be 0 or more, one of them above 0");
  if (*most > manifest.decoding.kappa)
    throw Error(ErrorKind::request, "kappa is " + std::to_string(*most) + " and the bundle's graphs give " +
                                        std::to_string(manifest.decoding.kappa) +
                                        " candidates; ask for less or re-cut the bundle with a larger --kappa");
  return fanout;
}

// The draft's streams are one token less than a pass of it gives at most.
std::vector<int> checked_tokens(const Manifest& manifest, const char* name, const std::vector<int>& tokens) {
  const int streams = manifest.draft ? manifest.draft->streams : 0;
  const auto [least, most] = std::minmax_element(tokens.begin(), tokens.end());
  if (tokens.empty() || *least < 1 || *most > 1 + streams)
    throw Error(ErrorKind::request, std::string(name) + " is " + listed(tokens) + "; the draft has " +
                                        std::to_string(streams) + " streams, so its counts must be 1 to " +
                                        std::to_string(1 + streams));
  return tokens;
}

// Fills the tokens and branches of a rollout's passes, and the tokens of a proposal's.
void choose_passes(Plan& plan, const Manifest& manifest, const EngineOptions& options) {
  const Settings& settings = manifest.settings;
  std::optional<std::vector<int>> branches = options.branches_per_pass, proposal = options.proposal_tokens_per_pass;
  // The bundle's other counts belong to the bundle's passes: a user's own have no limits, and are for proposals too.
  if (!options.tokens_per_pass) {
    if (!branches) branches = settings.branches_per_pass;
    if (!proposal) proposal = settings.proposal_tokens_per_pass;
  }
  const auto tokens = options.tokens_per_pass ? options.tokens_per_pass : settings.tokens_per_pass;
  plan.tokens_per_pass = checked_tokens(manifest, "tokens_per_pass", tokens.value_or(std::vector<int>{1}));
  plan.branches_per_pass = branches.value_or(std::vector<int>{});
  // What is counted out is done so.
  plan.adapt_branches = settings.adapt_branches && !options.fanout && !options.kappa && !options.branches_per_pass &&
                        !settings.branches_per_pass;
  const std::vector<int>& counts = plan.branches_per_pass;
  if (!counts.empty() && (counts.back() < 1 || !std::is_sorted(counts.rbegin(), counts.rend())))
    throw Error(ErrorKind::request,
                "branches_per_pass is " + listed(counts) + "; its counts must be 1 or more and never rise");
  plan.proposal_tokens_per_pass =
      checked_tokens(manifest, "proposal_tokens_per_pass", proposal.value_or(plan.tokens_per_pass));
}

int choose_draft_context(const Manifest& manifest, const EngineOptions& options, int max_length) {
  const auto asked = options.draft_context ? options.draft_context : manifest.settings.draft_context;
  const auto& draft = manifest.draft;
  if (asked && (!draft || draft->kind != "model" || draft->feature_layer))
    throw Error(ErrorKind::request,
                "draft_context is " + std::to_string(*asked) +
                    ", and this bundle has no draft that reads a context by itself: it is fed by the target's states, "
                    "looks its tokens up, or isn't there; leave draft_context out");
  return std::min(asked.value_or(max_length), max_length);
}

// In mirror mode on a shared CPU target and draft run at the same time, and a thread too many makes
// both wait at every layer: the draft gets a quarter, at least one, and the target the rest. Beside another device a
// draft leaves one core to the thread that feeds that, and takes no more than help it.
void split_threads(Plan& plan, int total, bool shared) {
  constexpr int most_draft_threads = 16;
  plan.target_threads = plan.draft_threads = total;
  if (plan.mode != Mode::mirror || total < 2) return;
  if (!shared) {
    plan.draft_threads = std::min(total - 1, most_draft_threads);
    return;
  }
  plan.draft_threads = std::max(1, total / 4);
  plan.target_threads = total - plan.draft_threads;
}

// Slots past max_length that a draft's graphs have room for, as the export makes them.
constexpr int rollout_slots = 4096;

void check_rollout(const Plan& plan) {
  const int rows = plan.rollout_slots();
  if (rows <= rollout_slots) return;
  throw Error(ErrorKind::request, "a rollout of " + std::to_string(plan.branches()) + " branches by " +
                                      std::to_string(plan.gamma) + " tokens takes " + std::to_string(rows) +
                                      " rows, and a draft's graphs have room for " + std::to_string(rollout_slots) +
                                      "; lower the fan-out or gamma, or give more tokens per pass");
}

const Graph& any_graph(const SegmentFacts& facts) { return facts.graphs.begin()->second; }

// A segment as a device runs it, under its usual name; none where the bundle has none.
std::optional<SegmentFacts> placed(const Manifest& manifest, const std::string& name, const Device& device) {
  auto found = device.int8_drafts() ? manifest.segments.find(name + "_int8") : manifest.segments.end();
  if (found == manifest.segments.end()) found = manifest.segments.find(name);
  if (found == manifest.segments.end()) return std::nullopt;
  SegmentFacts facts = found->second;
  facts.name = name;
  return facts;
}

// The same. Throws Error(bundle) if the bundle has none.
SegmentFacts placed_segment(const Manifest& manifest, const std::string& name, const Device& device) {
  auto facts = placed(manifest, name, device);
  return facts ? *std::move(facts) : manifest.segment(name);
}

// The bytes of one row [hidden] of a tensor [1, width, hidden].
std::size_t row_bytes(const SegmentFacts& facts, const TensorSpec* spec, const char* name) {
  const bool known = spec != nullptr && spec->shape.size() == 3 && std::holds_alternative<std::int64_t>(spec->shape[2]);
  if (!known)
    throw Error(ErrorKind::bundle, facts.name + " has no " + name + " [1, width, hidden]; export the bundle again");
  return static_cast<std::size_t>(std::get<std::int64_t>(spec->shape[2])) * size_of(spec->dtype);
}

// The last size of an output [1, rows, size].
int last_size(const SegmentFacts& facts, const char* name) {
  const TensorSpec* spec = any_graph(facts).output(name);
  if (spec == nullptr || spec->shape.empty() || !std::holds_alternative<std::int64_t>(spec->shape.back()))
    throw Error(ErrorKind::bundle, facts.name + " has no output " + name + " of a fixed size; export the bundle again");
  return static_cast<int>(std::get<std::int64_t>(spec->shape.back()));
}

void require_output(const SegmentFacts& facts, const char* name) {
  for (const auto& [form, graph] : facts.graphs)
    if (graph.output(name) == nullptr)
      throw Error(ErrorKind::bundle, facts.name + " has no output " + name + "; export the bundle again");
}

// Whether the least width of some shapes that holds a narrow pass gives the logits that it wants, and costs no more.
bool is_covered(const PassShape& narrow, const std::set<PassShape>& shapes, int padded_width) {
  int width = 0;  // the least one, once there is one
  for (const PassShape& shape : shapes) {
    const bool itself = shape.width == narrow.width && shape.rows == narrow.rows;
    if (itself || shape.width < narrow.width) continue;
    if (width == 0) width = shape.width;
    if (shape.width != width || width > padded_width) return false;
    if (shape.rows >= narrow.rows) return true;
  }
  return false;
}

// The passes of a proposal and of a rollout: one branch's, and those of all that take part. One branch's is left out
// where another's program of at most `padded_width`, padded, serves it.
std::vector<PassShape> draft_shapes(const Plan& plan, int padded_width) {
  std::set<PassShape> whole, single;
  std::size_t number = 0;
  for (const BranchPass& pass : branch_passes(plan.tokens_per_pass, plan.gamma)) {
    const int count = branches_at(number++, plan.branches(), plan.branches_per_pass);
    whole.insert({count * pass.rows(), count * pass.gives});
    single.insert({pass.rows(), pass.gives});
  }
  for (const BranchPass& pass : branch_passes(plan.proposal_tokens_per_pass, plan.gamma))
    single.insert({pass.rows(), pass.gives});
  std::set<PassShape> kept = whole;
  kept.insert(single.begin(), single.end());
  for (const PassShape& shape : single)
    if (whole.count(shape) == 0 && is_covered(shape, kept, padded_width)) kept.erase(shape);
  return {kept.begin(), kept.end()};
}

// The bytes of one row of the features that feed the draft, 0 for a draft of tokens alone.
std::size_t feature_bytes(const Manifest& manifest, const SegmentFacts& draft) {
  const auto& layer = manifest.draft->feature_layer;
  if (!layer) return 0;
  if (*layer != manifest.decoding.exit_layer)
    throw Error(ErrorKind::bundle, "the draft is fed by the state after layer " + std::to_string(*layer) +
                                       " and the target is cut after layer " +
                                       std::to_string(manifest.decoding.exit_layer) + "; export the bundle again");
  const SegmentFacts& prefix = manifest.segment("target_prefix");
  const std::size_t bytes = row_bytes(draft, any_graph(draft).input("features"), "features");
  if (bytes != row_bytes(prefix, any_graph(prefix).output("hidden_states"), "hidden_states"))
    throw Error(ErrorKind::bundle, "the draft takes other features than target_prefix gives; export the bundle again");
  return bytes;
}

}  // namespace

void EngineOptions::check() const {
  at_least_one("threads", threads);
  at_least_one("max_length", max_length);
  at_least_one("gamma", gamma);
  at_least_one("kappa", kappa);
  at_least_one("max_ngram_size", max_ngram_size);
  if (draft_context && *draft_context < 2)
    throw Error(ErrorKind::request, "draft_context is " + std::to_string(*draft_context) + "; it must be 2 or more");
  if (!(draft_timeout_s > 0))
    throw Error(ErrorKind::request, "draft_timeout_s is " + std::to_string(draft_timeout_s) + "; it must be above 0");
}

// Slots of a block of keys, as our own kernels lay them out.
constexpr int key_block = 16;

int Plan::draft_capacity() const { return (draft_context + rollout_slots() + key_block - 1) / key_block * key_block; }

int Plan::branches() const { return std::accumulate(fanout.begin(), fanout.end(), 0); }

int Plan::rollout_slots() const {
  const int most_given = *std::max_element(proposal_tokens_per_pass.begin(), proposal_tokens_per_pass.end());
  return rollout_capacity(0, gamma, branches(), tokens_per_pass, branches_per_pass, most_given);
}

Plan make_plan(const Manifest& manifest, const EngineOptions& options, bool shared_cpu) {
  options.check();
  const Settings& settings = manifest.settings;
  Plan plan{};
  plan.mode = mode_of(manifest, options);
  if (plan.mode != Mode::plain && !manifest.draft)
    throw Error(ErrorKind::request,
                "mode " + to_string(plan.mode) +
                    " needs a draft and this bundle has none; use mode plain, or export it with --draft");
  // As in Python: n-grams have few candidates of their own, a model's don't wait for the prefix.
  const bool ngram = manifest.draft && manifest.draft->kind == "ngram";
  plan.source = options.candidates.value_or(
      settings.candidates.value_or(ngram ? CandidateSource::both : CandidateSource::draft));
  plan.max_length = length_of(manifest, options);
  plan.gamma = options.gamma.value_or(settings.gamma.value_or(manifest.decoding.gamma));
  plan.fanout = fanout_of(manifest, options, plan.gamma);
  choose_passes(plan, manifest, options);
  plan.draft_context = choose_draft_context(manifest, options, plan.max_length);
  plan.pinned = options.pinned;
  plan.draft_timeout_s = options.draft_timeout_s;
  plan.max_ngram_size = options.max_ngram_size;
  split_threads(plan, options.threads.value_or(physical_cores()), shared_cpu);
  if (plan.mode != Mode::plain && manifest.draft->kind == "model") check_rollout(plan);
  return plan;
}

Placement open_devices(const Manifest& manifest, const EngineOptions& options) {
  const Settings& settings = manifest.settings;
  const std::string target = options.target_device.value_or(settings.target_device.value_or("cpu"));
  // Settings hold together: a suffix was placed beside the target's device of the same settings.
  const bool tuned = !options.target_device || options.target_device == settings.target_device;
  std::optional<std::string> suffix = options.suffix_device;
  if (!suffix && tuned) suffix = settings.suffix_device;
  Placement places;
  places.target = open_device(target);
  places.suffix = suffix && *suffix != target ? open_device(*suffix) : places.target;
  places.draft = open_device(draft_device_of(manifest, options), Role::draft);
  return places;
}

std::vector<MemoryNeed> memory_needs(const std::filesystem::path& folder, const Manifest& manifest, const Plan& plan,
                                     const Placement& places) {
  const int target = plan.target_capacity(), draft = plan.draft_capacity();
  struct Part {
    const char* name;
    const Device* device;
    int capacity;
  };
  std::vector<Part> parts = {{"target_prefix", places.target.get(), target},
                             {"exit_head", places.target.get(), target},
                             {"target_suffix", places.suffix.get(), target}};
  // The draft's two graphs share one cache, and in our own kernels their weights.
  if (plan.mode != Mode::plain) {
    parts.push_back({"draft_trunk", places.draft.get(), 0});
    parts.push_back({"draft", places.draft.get(), draft});
  }
  std::vector<MemoryNeed> needs;
  std::vector<std::string> names;
  for (const Part& part : parts) {
    const auto facts = placed(manifest, part.name, *part.device);
    if (!facts) continue;
    const auto at = std::find(names.begin(), names.end(), part.device->name()) - names.begin();
    if (at == static_cast<std::ptrdiff_t>(names.size())) {
      names.push_back(part.device->name());
      needs.push_back({part.device->free_memory(), {}});
    }
    SegmentMemory memory = segment_memory(folder, *facts, part.device->form(), part.capacity);
    if (facts->name == "draft_trunk" && facts->program && part.device->runs_programs()) memory.weight_bytes = 0;
    needs[static_cast<std::size_t>(at)].segments.push_back(std::move(memory));
  }
  return needs;
}

RoundShape round_shape(const Manifest& manifest, const Plan& plan, std::optional<int> most) {
  return {std::min(plan.gamma, most.value_or(plan.gamma)), manifest.decoding.prefill_chunk, needs_exit(plan.source),
          plan.mode != Mode::plain && manifest.draft && manifest.draft->feature_layer};
}

std::unique_ptr<Target> load_target(const std::filesystem::path& folder, const Manifest& manifest, const Plan& plan,
                                    const Placement& places) {
  const int capacity = plan.target_capacity();
  const std::vector<PassShape> shapes = {
      {1, 0}, {plan.gamma + 1, 0}, {std::min(manifest.decoding.prefill_chunk, capacity), 1}};
  const SegmentFacts &prefix = manifest.segment("target_prefix"), &head = manifest.segment("exit_head"),
                     &suffix = manifest.segment("target_suffix");
  require_output(prefix, "hidden_states");
  for (const char* name : {"candidate_ids", "candidate_logprobs"}) require_output(head, name);
  if (last_size(suffix, "logits") != manifest.model.vocab_size)
    throw Error(ErrorKind::bundle, "target_suffix gives " + std::to_string(last_size(suffix, "logits")) +
                                       " logits and the model has " + std::to_string(manifest.model.vocab_size) +
                                       " tokens; export the bundle again");
  const auto load = [&](Device& device, const SegmentFacts& facts) {
    return device.load_segment(folder, facts, capacity, shapes, {}, plan.target_threads);
  };
  TargetSegments segments{load(*places.target, prefix), load(*places.target, head), load(*places.suffix, suffix),
                          places.target != places.suffix || round_shape(manifest, plan, {}).wants_states};
  TargetShape shape{capacity,
                    manifest.model.max_positions,
                    manifest.model.vocab_size,
                    {},
                    row_bytes(prefix, any_graph(prefix).output("hidden_states"), "hidden_states")};
  if (plan.pinned) shape.pinned_width = plan.gamma + 1;
  return std::make_unique<Target>(std::move(segments), shape);
}

std::unique_ptr<Draft> load_draft(const std::filesystem::path& folder, const Manifest& manifest, const Plan& plan,
                                  Device& device) {
  if (manifest.draft->kind == "ngram")
    return std::make_unique<NgramDraft>(plan.source, plan.fanout, plan.max_ngram_size);
  const SegmentFacts trunk = placed_segment(manifest, "draft_trunk", device);
  const SegmentFacts branch = placed_segment(manifest, "draft", device);
  for (const char* name : {"candidate_ids", "candidate_logprobs"}) require_output(trunk, name);
  require_output(branch, "token_ids");
  if (trunk.program != branch.program)
    throw Error(ErrorKind::bundle,
                "draft and draft_trunk share a cache, and have different programs; export the bundle again");
  const int capacity = plan.draft_capacity();
  const auto steps = draft_shapes(plan, device.padded_width());
  DraftShape shape{capacity,
                   manifest.model.max_positions,
                   manifest.draft->vocab_size,
                   manifest.model.vocab_size,
                   manifest.decoding.prefill_chunk,
                   plan.tokens_per_pass,
                   plan.branches_per_pass,
                   plan.proposal_tokens_per_pass,
                   feature_bytes(manifest, branch)};
  auto window = device.load_segment(folder, trunk, capacity, {{plan.gamma + 1, 0}}, steps, plan.draft_threads);
  auto branches = device.load_segment(folder, branch, capacity, steps, {}, plan.draft_threads);
  // Where passes have fixed widths, fewer branches are padding.
  shape.adapts = plan.adapt_branches && branches->widths().empty();
  auto draft = std::make_unique<ModelDraft>(std::move(window), std::move(branches), std::move(shape), plan.source,
                                            plan.fanout);
  if (plan.draft_context == plan.max_length) return draft;
  return std::make_unique<RecentDraft>(std::move(draft), plan.draft_context);
}

}  // namespace mirror
