#include "kernel_segment.hpp"

#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "cores.hpp"
#include "draft_program.hpp"
#include "error.hpp"
#include "host_memory.hpp"
#include "kernels/draft_pass.h"

namespace mirror {
namespace {

const float* floats(const Bytes& bytes) { return reinterpret_cast<const float*>(bytes.get()); }

mirror_matrix given(const ProgramMatrix& matrix) {
  return {reinterpret_cast<const std::int8_t*>(matrix.values.get()), floats(matrix.scales), floats(matrix.bias),
          matrix.in, matrix.out};
}

mirror_layer given(const ProgramLayer& layer) {
  return {floats(layer.attention_norm), floats(layer.query_norm), floats(layer.key_norm),
          floats(layer.mlp_norm),       given(layer.qkv),         given(layer.output),
          given(layer.gate_up),         given(layer.down)};
}

// As draft_pass.h numbers them.
std::int32_t number(Storage storage) {
  static_assert(static_cast<int>(Storage::float32) == MIRROR_FLOAT32 &&
                static_cast<int>(Storage::blocks_4) == MIRROR_BLOCKS_4 &&
                static_cast<int>(Storage::blocks_8) == MIRROR_BLOCKS_8);
  return static_cast<std::int32_t>(storage);
}

}  // namespace

std::string wanted_kernels() {
  const char* said = std::getenv("MIRROR_KERNELS");
  std::string wanted;
  for (const char* letter = said == nullptr ? "" : said; *letter != 0; ++letter)
    if (*letter != ' ') wanted += static_cast<char>(std::tolower(static_cast<unsigned char>(*letter)));
  return wanted;
}

const char* chosen_kernels() {
  const std::string wanted = wanted_kernels();
  if (wanted == "off") return nullptr;
  if (!wanted.empty() && wanted != "amx" && wanted != "avx512" && wanted != "avx2")
    throw Error(ErrorKind::device,
                "MIRROR_KERNELS is " + wanted + "; give one of amx, avx512, avx2, off, or leave it unset");
  const char* found = mirror_kernels_of(wanted.c_str());
  if (wanted.empty() || found != nullptr) return found;
  const char* best = mirror_kernels_of(nullptr);
  throw Error(ErrorKind::device, "MIRROR_KERNELS is " + wanted + " and " +
                                     (best == nullptr ? "this library has no kernels for this CPU"
                                                      : std::string("this CPU's best are ") + best) +
                                     "; leave it unset");
}

// A draft's weights as the kernels take them, and the threads that run its passes.
class PackedDraft {
 public:
  using Draft = std::unique_ptr<mirror_draft, decltype(&mirror_draft_close)>;

  // Throws Error(device) if the kernels don't know a draft of its sizes.
  static std::shared_ptr<const PackedDraft> open(const DraftProgram& program, const char* kernels, int threads) {
    std::vector<mirror_layer> layers;
    for (const ProgramLayer& layer : program.layers) layers.push_back(given(layer));
    const ProgramEmbedding& table = program.embedding;
    const mirror_draft_facts facts{
        program.hidden,
        program.heads,
        program.kv_heads,
        program.head_dim,
        program.inner,
        static_cast<std::int32_t>(layers.size()),
        program.tokens,
        program.streams,
        program.positions,
        program.epsilon,
        program.scale,
        {table.values.get(), table.scales.get(), number(table.storage), number(table.scale_storage)},
        floats(program.stream_rows),
        floats(program.cosines),
        floats(program.sines),
        layers.data(),
        floats(program.norm),
        given(program.head),
        reinterpret_cast<const std::int64_t*>(program.vocabulary.get())};
    Draft draft(mirror_draft_open(&facts, kernels), mirror_draft_close);
    if (!draft)
      throw Error(ErrorKind::device,
                  std::string("the kernels ") + kernels + " can't run a draft of its sizes; export the bundle again");
    return std::make_shared<const PackedDraft>(program, kernels, std::move(draft), threads);
  }

  PackedDraft(const DraftProgram& program, const char* kernels_name, Draft draft, int threads)
      : kernels(kernels_name),
        layers(program.layers.size()),
        kv_heads(program.kv_heads),
        head_dim(program.head_dim),
        vocabulary(program.head.out),
        embedding_(program.embedding),
        draft_(std::move(draft)),
        team_(mirror_draft_team_open(threads, threads < physical_cores()), mirror_draft_team_close) {}

  // Whether the sizes fit each other.
  bool run(const mirror_draft_pass& pass) const { return mirror_draft_run(draft_.get(), team_.get(), &pass) == 0; }

  const char* const kernels;
  const std::size_t layers;
  const int kv_heads, head_dim, vocabulary;

 private:
  ProgramEmbedding embedding_;  // its rows are read in place
  Draft draft_;
  // Ends first: its threads may still be leaving a pass.
  std::unique_ptr<mirror_draft_team, decltype(&mirror_draft_team_close)> team_;
};

namespace {

// Keys in an order of the kernels' own: nothing else may read it.
struct KernelCache final : KVCache {
  int capacity = 0;
  std::vector<std::shared_ptr<void>> owners;
  std::vector<float*> keys, values;  // by layer, [kv_heads, capacity, head_dim]
};

// Candidates of a row in drawn answers, and of a pass in all: noise is added to them in a fraction of a millisecond.
constexpr int noisy_tokens = 256, most_candidates = 4096;

// One pass of one size; it has ended when it returns.
class KernelPass final : public BoundPass {
 public:
  KernelPass(std::string name, std::shared_ptr<const PackedDraft> draft, std::shared_ptr<const KernelCache> cache,
             const PassFeeds& feeds, int rows, int top)
      : name_(std::move(name)),
        draft_(std::move(draft)),
        cache_(std::move(cache)),
        feeds_(feeds),
        top_(top),
        drawn_top_(top == 0 ? 0 : std::max(top, std::min({noisy_tokens, draft_->vocabulary, most_candidates / rows}))),
        tokens_(static_cast<std::size_t>(rows)),
        candidates_(tokens_.size() * static_cast<std::size_t>(top)),
        logprobs_(candidates_.size()) {
    pass_.width = feeds.width;
    pass_.capacity = cache_->capacity;
    pass_.ids = feeds.ids.data();
    pass_.positions = feeds.positions.data();
    pass_.visible = feeds.row_visible.data();
    pass_.row_branch = feeds.row_branch.data();
    pass_.slot_branch = feeds.slot_branch->data();
    pass_.keys = cache_->keys.data();
    pass_.values = cache_->values.data();
    pass_.wanted = rows;
    pass_.wanted_rows = feeds.logit_rows.data();
    pass_.token_ids = tokens_.data();
  }

  void run(int past_length) override {
    pass_.past = past_length;
    pass_.top = feeds_.drawn ? drawn_top_ : top_;
    const auto count = tokens_.size() * static_cast<std::size_t>(pass_.top);
    if (candidates_.size() < count) {
      candidates_.resize(count);
      logprobs_.resize(count);
    }
    pass_.candidate_ids = candidates_.data();
    pass_.candidate_logprobs = logprobs_.data();
    outputs_ = {tokens_.data(), candidates_.data(), logprobs_.data(), pass_.top};
    if (!draft_->run(pass_))
      throw Error(ErrorKind::device, name_ + " can't run " + std::to_string(pass_.width) + " rows after " +
                                         std::to_string(past_length) + " in a cache of " +
                                         std::to_string(pass_.capacity) +
                                         " slots; load the bundle with a larger max_length");
  }
  const PassOutputs& outputs() override { return outputs_; }
  const float* logits(int) override { return nullptr; }  // no draft is asked for them
  float logit(int, std::int64_t) override { return 0; }
  const std::byte* hidden() override { return nullptr; }

 private:
  std::string name_;
  std::shared_ptr<const PackedDraft> draft_;
  std::shared_ptr<const KernelCache> cache_;
  const PassFeeds& feeds_;
  int top_, drawn_top_;  // candidates of a row: the graph's, and in drawn answers, which gain by more
  std::vector<std::int64_t> tokens_, candidates_;
  std::vector<float> logprobs_;
  mirror_draft_pass pass_{};
  PassOutputs outputs_;
};

// The window's segment, which gives candidates, or the branches', which gives tokens alone.
class KernelSegment final : public Segment {
 public:
  KernelSegment(std::string name, std::shared_ptr<const PackedDraft> draft, int capacity, int top)
      : name_(std::move(name)), draft_(std::move(draft)), capacity_(capacity), top_(top) {}

  const std::vector<int>& widths() const override { return any_; }

  std::unique_ptr<BoundPass> bind(PassFeeds& feeds, int rows, const std::shared_ptr<KVCache>& cache) override {
    const auto own = std::dynamic_pointer_cast<const KernelCache>(cache);
    if (!own) throw Error(ErrorKind::device, name_ + " was given a cache that it hasn't made; make one by its device");
    return std::make_unique<KernelPass>(name_, draft_, own, feeds, rows > 0 ? rows : feeds.width, top_);
  }

  std::shared_ptr<KVCache> make_cache() override {
    auto cache = std::make_shared<KernelCache>();
    cache->capacity = capacity_;
    const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(draft_->kv_heads) *
                              static_cast<std::size_t>(draft_->head_dim) * static_cast<std::size_t>(capacity_);
    for (std::size_t layer = 0; layer < draft_->layers; ++layer)
      for (std::vector<float*>* part : {&cache->keys, &cache->values}) {
        cache->owners.push_back(zeroed_memory(bytes));
        part->push_back(static_cast<float*>(cache->owners.back().get()));
      }
    return cache;
  }

 private:
  std::string name_;
  std::shared_ptr<const PackedDraft> draft_;
  int capacity_, top_;
  std::vector<int> any_;
};

// How many candidates a graph gives, 0 for none. Throws Error(bundle) if it isn't what its program can give.
int top_of(const SegmentFacts& facts, const Graph& graph, const PackedDraft& draft) {
  const TensorSpec* spec = graph.output("candidate_ids");
  if (spec == nullptr) return 0;
  const auto* top = spec->shape.size() == 3 ? std::get_if<std::int64_t>(&spec->shape[2]) : nullptr;
  if (top == nullptr || *top < 1 || *top > draft.vocabulary)
    throw Error(ErrorKind::bundle, facts.name +
                                       ": candidate_ids has another shape than the contract says, or more "
                                       "candidates than its program has tokens; export the bundle again");
  return static_cast<int>(*top);
}

void check_kv(const SegmentFacts& facts, const PackedDraft& draft) {
  const bool same =
      facts.kv.size() == draft.layers && std::all_of(facts.kv.begin(), facts.kv.end(), [&draft](const LayerKV& layer) {
        return layer.heads == draft.kv_heads && layer.head_dim == draft.head_dim && layer.dtype == DType::float32;
      });
  if (same) return;
  throw Error(ErrorKind::bundle, facts.name + " has another cache than " + *facts.program +
                                     " says: " + std::to_string(draft.layers) + " layers of " +
                                     std::to_string(draft.kv_heads) + " heads of " + std::to_string(draft.head_dim) +
                                     " float32 numbers; export the bundle again");
}

}  // namespace

std::unique_ptr<Segment> KernelDrafts::load(const std::filesystem::path& folder, const SegmentFacts& facts,
                                            const Graph& graph, int capacity, int threads) {
  const char* kernels = facts.program ? chosen_kernels() : nullptr;
  if (kernels == nullptr) return nullptr;
  auto& known = packed_[Key(folder, *facts.program, threads)];
  std::shared_ptr<const PackedDraft> draft = known.lock();
  if (!draft) {
    const auto program = read_draft_program(folder, *facts.program);
    if (program) draft = PackedDraft::open(*program, kernels, threads);
    known = draft;
  }
  if (!draft) return nullptr;
  check_kv(facts, *draft);
  return std::make_unique<KernelSegment>(facts.name, draft, capacity, top_of(facts, graph, *draft));
}

const char* KernelDrafts::in_use() const {
  for (const auto& [key, draft] : packed_)
    if (const auto loaded = draft.lock()) return loaded->kernels;
  return nullptr;
}

}  // namespace mirror
