// The C interface: packing, working memory, threads, and the choice of an instruction set. Compiled for any x86-64.
#include "draft_pass.h"

#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "draft.hpp"
#include "kernels.hpp"

namespace {

using namespace mirror_kernels;

// --- instruction sets ------------------------------------------------------------------------------------------------

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned sub) {
  Registers r;
  if (!__get_cpuid_count(leaf, sub, &r.a, &r.b, &r.c, &r.d)) return {};
  return r;
}

bool has(unsigned bits, int bit) { return (bits >> bit & 1) != 0; }

// State that the system saves for a thread, from XCR0.
uint64_t saved_state() {
  if (!has(cpuid(1, 0).c, 27)) return 0;
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

bool has_avx2() {
  const Registers basic = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
  return (saved_state() & 6) == 6 && has(basic.c, 12) && has(seven.b, 5) && has(more.a, 4);
}

bool has_avx512() {
  const Registers seven = cpuid(7, 0);
  return (saved_state() & 0xe6) == 0xe6 && has(seven.b, 16) && has(seven.b, 17) && has(seven.b, 30) &&
         has(seven.b, 31) && has(seven.c, 11);
}

bool has_amx() {
  const Registers seven = cpuid(7, 0);
  static const bool usable = (saved_state() >> 17 & 3) == 3 && has(seven.d, 22) && has(seven.d, 24) &&
                             has(seven.d, 25) && has(cpuid(7, 1).a, 5) && has_avx512() && use_matrix_units();
  return usable;
}

struct Kernels {
  const char* name;
  bool (*is_here)();
  RunPass (*pass)();
};

constexpr Kernels all_kernels[] = {
    {"amx", has_amx, amx_pass}, {"avx512", has_avx512, avx512_pass}, {"avx2", has_avx2, avx2_pass}};

const Kernels* kernels_of(const char* wanted) {
  for (const Kernels& kernels : all_kernels)
    if ((wanted == nullptr || *wanted == 0 || std::strcmp(wanted, kernels.name) == 0) && kernels.is_here())
      return &kernels;
  return nullptr;
}

// --- memory ----------------------------------------------------------------------------------------------------------

// Memory at multiples of 64 bytes, zeroed; taken back as one.
class Arena {
 public:
  template <typename T>
  T* take(std::int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 127) / 64 * 64;
    void* block = ::operator new(bytes, std::align_val_t(64));
    std::memset(block, 0, bytes);
    blocks_.emplace_back(block);
    return static_cast<T*>(block);
  }

  void clear() { blocks_.clear(); }

 private:
  struct Free {
    void operator()(void* block) const { ::operator delete(block, std::align_val_t(64)); }
  };
  std::vector<std::unique_ptr<void, Free>> blocks_;
};

float* copied(Arena& arena, const float* numbers, std::int64_t count) {
  if (numbers == nullptr) return nullptr;
  float* copy = arena.take<float>(count);
  std::copy_n(numbers, count, copy);
  return copy;
}

Matrix packed(Arena& arena, const mirror_matrix& given, bool fine) {
  Matrix matrix;
  matrix.in = given.in;
  matrix.out = given.out;
  matrix.tiles = (given.out + tile_columns - 1) / tile_columns;
  const std::int64_t columns = static_cast<std::int64_t>(matrix.tiles) * tile_columns;
  std::int8_t* values = arena.take<std::int8_t>(columns * matrix.row_bytes());
  std::int32_t* offsets = arena.take<std::int32_t>(columns);
  const std::int64_t blocks = matrix.row_bytes() / padded_inputs;
  std::int32_t* block_offsets = fine ? arena.take<std::int32_t>(columns * blocks) : nullptr;
  for (std::int64_t i = 0; i < given.in; i++)
    for (std::int64_t j = 0; j < given.out; j++) {
      const std::int8_t value = given.values[i * given.out + j];
      const std::int64_t tile = j / tile_columns * matrix.row_bytes() * tile_columns;
      values[tile + i / 4 * 64 + j % tile_columns * 4 + i % 4] = value;
      offsets[j] += 128 * value;
      if (fine) {
        const std::int64_t block = j / tile_columns * blocks + i / padded_inputs;
        block_offsets[block * tile_columns + j % tile_columns] += 128 * value;
      }
    }
  matrix.values = values;
  matrix.offsets = offsets;
  matrix.block_offsets = block_offsets;
  float* scales = arena.take<float>(columns);
  std::copy_n(given.scales, given.out, scales);
  matrix.scales = scales;
  if (given.bias) {
    float* bias = arena.take<float>(columns);
    std::copy_n(given.bias, given.out, bias);
    matrix.bias = bias;
  }
  return matrix;
}

// Layers up to which one scale for each row does no harm. More of them make much of what rounding takes from the small
// numbers of a row with a few large ones; a scale for each 64 costs wide passes some time, and matrix units too much.
constexpr int coarse_layers = 8;

constexpr int steps_per_layer = 9, other_steps = 4;

int steps_of(const Draft& draft) { return steps_per_layer * draft.layer_count + other_steps; }

bool fits(const mirror_draft_facts& facts) {
  if (facts.hidden < 16 || facts.hidden % 16 || facts.inner < 16 || facts.inner % 16) return false;
  if (facts.head_dim < 16 || facts.head_dim % 16 || facts.head_dim > 512) return false;
  if (facts.kv_heads < 1 || facts.heads < 1 || facts.heads % facts.kv_heads) return false;
  if (facts.layer_count < 1 || steps_per_layer * facts.layer_count + other_steps > most_steps || facts.positions < 1 ||
      facts.tokens < 1)
    return false;
  const int all_heads = facts.heads * facts.head_dim;
  for (int i = 0; i < facts.layer_count; i++) {
    const mirror_layer& layer = facts.layers[i];
    if (layer.qkv.in != facts.hidden || layer.qkv.out != all_heads + 2 * facts.kv_heads * facts.head_dim) return false;
    if (layer.output.in != all_heads || layer.output.out != facts.hidden) return false;
    if (layer.gate_up.in != facts.hidden || layer.gate_up.out != 2 * facts.inner) return false;
    if (layer.down.in != facts.inner || layer.down.out != facts.hidden) return false;
  }
  return facts.head.in == facts.hidden && facts.head.out >= 1;
}

}  // namespace

struct mirror_draft {
  Arena arena;
  Draft draft;
  RunPass run = nullptr;
};

void mirror_kernels::Turn::give_way() { std::this_thread::yield(); }

struct mirror_draft_team {
 public:
  mirror_draft_team(int threads, bool spare) : size_(threads), awake_(spare ? long_ : short_) {
    for (int number = 1; number < threads; number++) workers_.emplace_back([this, number] { work(number); });
  }

  ~mirror_draft_team() {
    closing_.store(true);
    pass_number_.fetch_add(1);
    pass_number_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  std::int32_t run(const mirror_draft& draft, const mirror_draft_pass& pass) {
    const std::lock_guard one_at_a_time(runs_);
    if (!prepare(draft.draft, pass)) return 1;
    const std::uint32_t number = pass_number_.load(std::memory_order_relaxed) + 1;
    writing_.store(true);
    while (reading_.load() != 0) _mm_pause();
    task_ = {&draft, pass, work_};
    const std::uint64_t fresh = static_cast<std::uint64_t>(number) << 32;
    for (int step = 0; step < steps_of(draft.draft); step++) {
      steps_[step].claimed.store(fresh, std::memory_order_relaxed);
      steps_[step].done.store(fresh, std::memory_order_relaxed);
    }
    pass_number_.store(number, std::memory_order_release);
    writing_.store(false);
    if (size_ > 1) pass_number_.notify_all();
    Turn turn(steps_.get(), number, 0, size_);
    draft.run(draft.draft, work_, pass, turn);
    return 0;
  }

 private:
  struct Task {
    const mirror_draft* draft = nullptr;
    mirror_draft_pass pass{};
    Work work;
  };

  // How long threads stay awake after a pass: the next one of a rollout comes soon, and to be woken takes them as long
  // as a small pass.
  static constexpr std::chrono::microseconds short_{60}, long_{1500};

  void work(int thread) {
    std::uint32_t seen = 0;
    while (true) {
      const auto until = std::chrono::steady_clock::now() + awake_;
      while (pass_number_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until)
        for (int i = 0; i < 16; i++) _mm_pause();
      pass_number_.wait(seen, std::memory_order_acquire);
      const Task task = read_task(seen);
      if (closing_.load()) return;  // asked last: `seen` may be the number that closing gave
      Turn turn(steps_.get(), seen, thread, size_);
      task.draft->run(task.draft->draft, task.work, task.pass, turn);
    }
  }

  // The newest task and its number. Many may read at once, and none while one is written.
  Task read_task(std::uint32_t& number) {
    while (true) {
      reading_.fetch_add(1);
      if (!writing_.load()) break;
      reading_.fetch_sub(1);
      while (writing_.load()) _mm_pause();
    }
    number = pass_number_.load();
    Task task = task_;
    reading_.fetch_sub(1);
    return task;
  }

  bool prepare(const Draft& draft, const mirror_draft_pass& pass) {
    if (pass.width < 1 || pass.past < 0 || pass.wanted < 0 || pass.top < 0 || pass.capacity % 16) return false;
    if (pass.past + pass.width > pass.capacity || pass.top > draft.head.out) return false;
    for (int i = 0; i < pass.wanted; i++)
      if (pass.wanted_rows[i] < 0 || pass.wanted_rows[i] >= pass.width) return false;
    sort_branches(pass);
    const bool roomy = &draft == shaped_for_ && pass.width <= rows_ && pass.wanted <= wanted_ &&
                       (pass.top == 0 || pass.wanted <= logit_rows_) && pass.capacity <= capacity_ &&
                       work_.branches.most <= most_own_;
    if (!roomy) allocate(draft, pass);
    shaped_for_ = &draft;
    return true;
  }

  // The slots of each branch, in a pass's reach.
  void sort_branches(const mirror_draft_pass& pass) {
    int first = pass.past, branches = 0;
    for (int row = 0; row < pass.width; row++) {
      first = std::min(first, std::max(0, pass.visible[row]));
      branches = std::max(branches, pass.row_branch[row] + 1);
    }
    const int end = pass.past + pass.width;
    branch_starts_.assign(static_cast<std::size_t>(branches) + 2, 0);
    branch_slots_.resize(static_cast<std::size_t>(end - first) + 1);
    for (int slot = first; slot < end; slot++)
      if (const int branch = pass.slot_branch[slot]; branch >= 0 && branch < branches)
        branch_starts_[static_cast<std::size_t>(branch) + 2]++;
    int most = 0;
    for (int branch = 0; branch < branches; branch++) {
      most = std::max(most, branch_starts_[static_cast<std::size_t>(branch) + 2]);
      branch_starts_[static_cast<std::size_t>(branch) + 2] += branch_starts_[static_cast<std::size_t>(branch) + 1];
    }
    for (int slot = first; slot < end; slot++)
      if (const int branch = pass.slot_branch[slot]; branch >= 0 && branch < branches)
        branch_slots_[static_cast<std::size_t>(branch_starts_[static_cast<std::size_t>(branch) + 1]++)] = slot;
    work_.branches = {branch_starts_.data(), branch_slots_.data(), branches, most};
  }

  void allocate(const Draft& draft, const mirror_draft_pass& pass) {
    arena_.clear();
    rows_ = std::max(rows_, up_to(pass.width, 32));
    wanted_ = std::max(wanted_, up_to(pass.wanted, 32));
    if (pass.top > 0) logit_rows_ = std::max(logit_rows_, up_to(pass.wanted, 8));
    capacity_ = std::max(capacity_, static_cast<int>(pass.capacity));
    most_own_ = std::max(most_own_, 2 * work_.branches.most);
    const BranchSlots branches = work_.branches;
    const std::int64_t rows = std::max(rows_, wanted_);
    work_ = {};
    work_.branches = branches;
    work_.x = arena_.take<float>(rows * draft.hidden);
    // An odd number of cache lines, so that rows don't compete for the same places in a cache.
    const int widest = up_to(std::max({draft.hidden, draft.inner, draft.heads * draft.head_dim}), padded_inputs);
    work_.rounded_stride = widest;
    if (work_.rounded_stride / 64 % 2 == 0) work_.rounded_stride += 64;
    work_.rounded = arena_.take<std::uint8_t>((rows + 32) * work_.rounded_stride);
    work_.scale_stride = draft.fine ? widest / padded_inputs : 1;
    work_.row_scales = arena_.take<float>((rows + 32) * work_.scale_stride);
    work_.queries = arena_.take<float>(rows * draft.heads * draft.head_dim);
    work_.mixed = arena_.take<float>(rows * draft.heads * draft.head_dim);
    work_.inner = arena_.take<float>(rows * draft.inner);
    if (logit_rows_ > 0)
      work_.logits = arena_.take<float>(static_cast<std::int64_t>(logit_rows_) * draft.head.tiles * tile_columns);
    const std::int64_t parts = (draft.head.tiles + head_tiles - 1) / head_tiles;
    work_.best = arena_.take<float>(parts * wanted_);
    work_.best_places = arena_.take<std::int32_t>(parts * wanted_);
    // Of up to 16 queries: scores, what they mix, their own slots, and their weights in 16 bits.
    constexpr std::int64_t most_queries = 16;
    const std::int64_t slots = up_to(capacity_, 32) + 64;
    const std::int64_t attention =
        most_queries * (slots + 2 * draft.head_dim + 2 * (most_own_ + 16)) + most_queries * (slots + 32) / 2 + 64;
    work_.scratch_size =
        up_to(static_cast<int>(std::max<std::int64_t>(attention, 32 * std::max(256, draft.head_dim))), 16);
    work_.scratch = arena_.take<float>(size_ * work_.scratch_size);
  }

  const int size_;
  const std::chrono::microseconds awake_;
  std::mutex runs_;
  std::atomic<std::uint32_t> pass_number_{0};
  std::atomic<bool> closing_{false}, writing_{false};
  std::atomic<int> reading_{0};
  std::unique_ptr<Step[]> steps_ = std::make_unique<Step[]>(most_steps);
  Task task_;
  const Draft* shaped_for_ = nullptr;
  Work work_;
  Arena arena_;
  std::vector<std::int32_t> branch_starts_, branch_slots_;
  int rows_ = 0, wanted_ = 0, logit_rows_ = 0, capacity_ = 0, most_own_ = 0;
  std::vector<std::thread> workers_;  // last: they use the rest
};

extern "C" {

const char* mirror_kernels_of(const char* wanted) {
  const Kernels* kernels = kernels_of(wanted);
  return kernels ? kernels->name : nullptr;
}

std::int32_t mirror_kernels_version(void) { return MIRROR_KERNELS_VERSION; }

mirror_draft* mirror_draft_open(const mirror_draft_facts* facts, const char* wanted) {
  const Kernels* kernels = kernels_of(wanted);
  if (kernels == nullptr || !fits(*facts)) return nullptr;
  auto made = std::make_unique<mirror_draft>();
  Arena& arena = made->arena;
  Draft& draft = made->draft;
  draft.hidden = facts->hidden;
  draft.heads = facts->heads;
  draft.kv_heads = facts->kv_heads;
  draft.head_dim = facts->head_dim;
  draft.inner = facts->inner;
  draft.layer_count = facts->layer_count;
  draft.tokens = facts->tokens;
  draft.streams = facts->stream_rows ? facts->streams : 0;
  draft.positions = facts->positions;
  draft.epsilon = facts->epsilon;
  draft.scale = facts->scale;
  draft.fine = facts->layer_count > coarse_layers && std::strcmp(kernels->name, "amx") != 0;
  draft.embedding = facts->embedding;
  draft.stream_rows = copied(arena, facts->stream_rows, static_cast<std::int64_t>(facts->streams) * facts->hidden);
  const std::int64_t angles = static_cast<std::int64_t>(facts->positions) * (facts->head_dim / 2);
  draft.cosines = copied(arena, facts->cosines, angles);
  draft.sines = copied(arena, facts->sines, angles);
  draft.norm = copied(arena, facts->norm, facts->hidden);
  Layer* layers = new (arena.take<Layer>(facts->layer_count)) Layer[static_cast<std::size_t>(facts->layer_count)];
  for (int i = 0; i < facts->layer_count; i++) {
    const mirror_layer& given = facts->layers[i];
    layers[i].attention_norm = copied(arena, given.attention_norm, facts->hidden);
    layers[i].query_norm = copied(arena, given.query_norm, facts->head_dim);
    layers[i].key_norm = copied(arena, given.key_norm, facts->head_dim);
    layers[i].mlp_norm = copied(arena, given.mlp_norm, facts->hidden);
    layers[i].qkv = packed(arena, given.qkv, draft.fine);
    layers[i].output = packed(arena, given.output, draft.fine);
    layers[i].gate_up = packed(arena, given.gate_up, draft.fine);
    layers[i].down = packed(arena, given.down, draft.fine);
  }
  draft.layers = layers;
  draft.head = packed(arena, facts->head, draft.fine);
  if (facts->vocabulary) {
    std::int64_t* vocabulary = arena.take<std::int64_t>(facts->head.out);
    std::copy_n(facts->vocabulary, facts->head.out, vocabulary);
    draft.vocabulary = vocabulary;
  }
  made->run = kernels->pass();
  return made.release();
}

void mirror_draft_close(mirror_draft* draft) { delete draft; }

mirror_draft_team* mirror_draft_team_open(std::int32_t threads, std::int32_t spare) {
  return new mirror_draft_team(std::max(1, threads), spare != 0);
}

void mirror_draft_team_close(mirror_draft_team* team) { delete team; }

std::int32_t mirror_draft_run(const mirror_draft* draft, mirror_draft_team* team, const mirror_draft_pass* pass) {
  return team->run(*draft, *pass);
}
}
