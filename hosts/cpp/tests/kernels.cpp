// The kernels that run drafts (hosts/kernels), by their C interface alone: `mirror_kernels`. Random drafts are run in
// every instruction set that this CPU has and by several teams of threads, beside the same pass written plainly.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "checks.hpp"
#include "kernels/draft_pass.h"

namespace {

using Floats = std::vector<float>;

constexpr int capacity = 256;

struct Sizes {
  int hidden, heads, kv_heads, head_dim, inner, layers, vocabulary;
  int storage = MIRROR_FLOAT32;
  bool head_norms = false, biases = false, trimmed = false;
  int tokens = 71, streams = 3, positions = 120;
};

struct Linear {
  std::vector<std::int8_t> values;
  Floats scales, bias;
  int in = 0, out = 0;

  mirror_matrix facts() const { return {values.data(), scales.data(), bias.empty() ? nullptr : bias.data(), in, out}; }
};

struct Layer {
  Floats attention_norm, query_norm, key_norm, mlp_norm;
  Linear qkv, output, gate_up, down;
};

float as_half(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, rest = bits & 1023;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(rest), -24)
                                   : std::ldexp(static_cast<float>(rest + 1024), exponent - 25);
  return bits >> 15 ? -size : size;
}

// A random draft, as the kernels are given it and as plain numbers.
struct Draft {
  explicit Draft(const Sizes& sizes, unsigned seed) : s(sizes), random(seed) {
    for (int layer = 0; layer < s.layers; ++layer) {
      Layer made;
      made.attention_norm = floats(s.hidden, 0.5f, 1.5f);
      made.mlp_norm = floats(s.hidden, 0.5f, 1.5f);
      if (s.head_norms) made.query_norm = floats(s.head_dim, 0.5f, 1.5f);
      if (s.head_norms) made.key_norm = floats(s.head_dim, 0.5f, 1.5f);
      made.qkv = linear(s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim);
      made.output = linear(s.heads * s.head_dim, s.hidden);
      made.gate_up = linear(s.hidden, 2 * s.inner);
      made.down = linear(s.inner, s.hidden);
      // Where there are many, the last ones say nothing: a number that is rounded the other way would reach every row.
      if (layer >= 3)
        for (Linear* matrix : {&made.output, &made.down}) matrix->scales.assign(matrix->scales.size(), 0);
      layers.push_back(std::move(made));
    }
    norm = floats(s.hidden, 0.5f, 1.5f);
    head = linear(s.hidden, s.vocabulary);
    stream_rows = floats(s.streams * s.hidden, -1, 1);
    for (int position = 0; position < s.positions; ++position)
      for (int i = 0; i < s.head_dim / 2; ++i) {
        const double angle = position * std::pow(100.0, -2.0 * i / s.head_dim);
        cosines.push_back(static_cast<float>(std::cos(angle)));
        sines.push_back(static_cast<float>(std::sin(angle)));
      }
    if (s.trimmed)
      for (int place = 0; place < s.vocabulary; ++place) vocabulary.push_back(1000 - 3 * place);
    store_rows();
  }

  mirror_draft_facts facts() {
    for (const Layer& layer : layers)
      layer_facts.push_back({layer.attention_norm.data(), s.head_norms ? layer.query_norm.data() : nullptr,
                             s.head_norms ? layer.key_norm.data() : nullptr, layer.mlp_norm.data(), layer.qkv.facts(),
                             layer.output.facts(), layer.gate_up.facts(), layer.down.facts()});
    return {s.hidden,
            s.heads,
            s.kv_heads,
            s.head_dim,
            s.inner,
            s.layers,
            s.tokens,
            s.streams,
            s.positions,
            epsilon,
            1 / std::sqrt(static_cast<float>(s.head_dim)),
            {stored.data(), scales.empty() ? nullptr : scales.data(), s.storage, MIRROR_FLOAT32},
            stream_rows.data(),
            cosines.data(),
            sines.data(),
            layer_facts.data(),
            norm.data(),
            head.facts(),
            s.trimmed ? vocabulary.data() : nullptr};
  }

  float uniform(float least, float most) {
    return least + (most - least) * static_cast<float>(random() >> 8) / static_cast<float>(1 << 24);
  }
  Floats floats(int count, float least, float most) {
    Floats made(static_cast<std::size_t>(count));
    for (float& number : made) number = uniform(least, most);
    return made;
  }
  Linear linear(int in, int out) {
    Linear made{{}, floats(out, 0.5f, 1.5f), {}, in, out};
    for (int i = 0; i < in * out; ++i)
      made.values.push_back(static_cast<std::int8_t>(static_cast<int>(random() % 255) - 127));
    for (float& scale : made.scales) scale *= 0.012f / std::sqrt(static_cast<float>(in));
    if (s.biases) made.bias = floats(out, -0.2f, 0.2f);
    return made;
  }

  // The embedding as its kind says, and what it stands for.
  void store_rows() {
    const std::size_t count = static_cast<std::size_t>(s.tokens) * static_cast<std::size_t>(s.hidden);
    if (s.storage == MIRROR_BLOCKS_4 || s.storage == MIRROR_BLOCKS_8)
      scales = floats(static_cast<int>(count / 32), 0.1f, 0.2f);
    for (std::size_t i = 0; i < count; ++i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(random());
      if (s.storage == MIRROR_FLOAT32) {
        rows.push_back(uniform(-1, 1));
        put(&rows.back(), 4);
      } else if (s.storage == MIRROR_FLOAT16) {
        const std::uint16_t half = static_cast<std::uint16_t>(bits & 0xBFFFu);  // below 2
        rows.push_back(as_half(half));
        put(&half, 2);
      } else if (s.storage == MIRROR_BFLOAT16) {
        const float number = uniform(-1, 1);
        std::uint32_t whole;
        std::memcpy(&whole, &number, 4);
        const std::uint32_t kept = whole & 0xFFFF0000u;
        const std::uint16_t upper = static_cast<std::uint16_t>(kept >> 16);
        rows.emplace_back();
        std::memcpy(&rows.back(), &kept, 4);
        put(&upper, 2);
      } else if (s.storage == MIRROR_BLOCKS_8) {
        const std::uint8_t byte = static_cast<std::uint8_t>(bits);
        rows.push_back(scales[i / 32] * static_cast<float>(byte - 128) / 16);
        put(&byte, 1);
      } else {
        const std::uint8_t nibble = static_cast<std::uint8_t>(bits & 15);
        rows.push_back(scales[i / 32] * static_cast<float>(nibble - 8));
        if (i % 2 == 0) put(&nibble, 1);
        if (i % 2 == 1) stored.back() = static_cast<std::uint8_t>(stored.back() | nibble << 4);
      }
    }
    if (s.storage == MIRROR_BLOCKS_8)
      for (float& scale : scales) scale /= 16;
  }
  void put(const void* from, std::size_t bytes) {
    const auto* first = static_cast<const std::uint8_t*>(from);
    stored.insert(stored.end(), first, first + bytes);
  }

  static constexpr float epsilon = 1e-5f;
  Sizes s;
  std::mt19937 random;
  std::vector<Layer> layers;
  std::vector<mirror_layer> layer_facts;
  Floats norm, stream_rows, cosines, sines, rows, scales;
  std::vector<std::uint8_t> stored;
  Linear head;
  std::vector<std::int64_t> vocabulary;
};

// The inputs of a pass.
struct Inputs {
  int past = 0;
  std::vector<std::int64_t> ids, positions, wanted;
  std::vector<std::int32_t> visible, branches;

  int width() const { return static_cast<int>(ids.size()); }
  void row(std::int64_t id, int position, int sees, int branch) {
    ids.push_back(id);
    positions.push_back(position);
    visible.push_back(sees);
    branches.push_back(branch);
  }
};

struct Outputs {
  std::vector<std::int64_t> tokens, candidates;
  Floats logprobs;

  bool operator==(const Outputs& other) const {
    return tokens == other.tokens && candidates == other.candidates && logprobs == other.logprobs;
  }
};

// --- the pass, plainly -----------------------------------------------------------------------------------------------

class Plain {
 public:
  // With `fine`, rows are rounded by a scale for each 64 numbers.
  Plain(const Draft& draft, bool fine) : d_(draft), s_(draft.s), fine_(fine) {
    const auto size = static_cast<std::size_t>(s_.layers * capacity * s_.kv_heads * s_.head_dim);
    keys_.resize(size);
    values_.resize(size);
  }

  // The logits of the wanted rows.
  std::vector<Floats> run(const Inputs& in, const std::vector<std::int32_t>& slot_branch) {
    std::vector<Floats> x;
    for (const std::int64_t id : in.ids) {
      const bool stream = id >= s_.tokens;
      const Floats& table = stream ? d_.stream_rows : d_.rows;
      const auto first = table.begin() + (stream ? id - s_.tokens : id) * s_.hidden;
      x.emplace_back(first, first + s_.hidden);
    }
    for (int layer = 0; layer < s_.layers; ++layer) {
      const Layer& weights = d_.layers[static_cast<std::size_t>(layer)];
      std::vector<Floats> queries;
      for (int row = 0; row < in.width(); ++row) queries.push_back(place(weights, layer, x[at(row)], in, row));
      for (int row = 0; row < in.width(); ++row) {
        add(x[at(row)], product(attend(layer, queries[at(row)], in, row, slot_branch), weights.output));
        const Floats both = product(normed(x[at(row)], weights.mlp_norm), weights.gate_up);
        Floats opened;
        for (int i = 0; i < s_.inner; ++i)
          opened.push_back(both[at(i)] / (1 + std::exp(-both[at(i)])) * both[at(s_.inner + i)]);
        add(x[at(row)], product(opened, weights.down));
      }
    }
    std::vector<Floats> logits;
    for (const std::int64_t row : in.wanted)
      logits.push_back(product(normed(x[static_cast<std::size_t>(row)], d_.norm), d_.head));
    return logits;
  }

 private:
  static std::size_t at(int index) { return static_cast<std::size_t>(index); }

  static void add(Floats& to, const Floats& from) {
    for (std::size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  }

  static Floats normed(const Floats& x, const Floats& weights) {
    double squares = 0;
    for (const float number : x) squares += static_cast<double>(number) * number;
    const double factor = 1 / std::sqrt(squares / static_cast<double>(x.size()) + Draft::epsilon);
    Floats result;
    for (std::size_t i = 0; i < x.size(); ++i)
      result.push_back(static_cast<float>(x[i] * factor) * weights[i % weights.size()]);
    return result;
  }

  // What is multiplied is rounded to 8 bits by the greatest number of the row, or of its block.
  Floats product(const Floats& x, const Linear& matrix) const {
    const int block = fine_ ? 64 : matrix.in;
    Floats result(at(matrix.out));
    for (int first = 0; first < matrix.in; first += block) {
      const int end = std::min(first + block, matrix.in);
      float top = 1e-20f;
      for (int i = first; i < end; ++i) top = std::max(top, std::abs(x[at(i)]));
      for (int j = 0; j < matrix.out; ++j) {
        int total = 0;
        for (int i = first; i < end; ++i)
          total += static_cast<int>(std::lrint(x[at(i)] * (127 / top))) * matrix.values[at(i * matrix.out + j)];
        result[at(j)] += static_cast<float>(total) * (top / 127);
      }
    }
    for (int j = 0; j < matrix.out; ++j)
      result[at(j)] = result[at(j)] * matrix.scales[at(j)] + (matrix.bias.empty() ? 0 : matrix.bias[at(j)]);
    return result;
  }

  float* slot_of(Floats& cache, int layer, int slot, int head) {
    return cache.data() + at(((layer * capacity + slot) * s_.kv_heads + head) * s_.head_dim);
  }

  void turn(float* part, int position, const Floats& norm) const {
    if (!norm.empty()) {
      const Floats even = normed(Floats(part, part + s_.head_dim), norm);
      std::copy(even.begin(), even.end(), part);
    }
    const int half = s_.head_dim / 2, row = std::min(position, s_.positions - 1) * half;
    for (int i = 0; i < half; ++i) {
      const float first = part[i], second = part[half + i];
      const float cosine = d_.cosines[at(row + i)], sine = d_.sines[at(row + i)];
      part[i] = first * cosine - second * sine;
      part[half + i] = second * cosine + first * sine;
    }
  }

  // Writes a row's keys and values; returns its queries.
  Floats place(const Layer& weights, int layer, const Floats& x, const Inputs& in, int row) {
    Floats parts = product(normed(x, weights.attention_norm), weights.qkv);
    const int position = static_cast<int>(in.positions[at(row)]), size = s_.head_dim;
    for (int head = 0; head < s_.heads; ++head) turn(parts.data() + head * size, position, weights.query_norm);
    for (int head = 0; head < s_.kv_heads; ++head) {
      float* key = parts.data() + (s_.heads + head) * size;
      turn(key, position, weights.key_norm);
      std::copy(key, key + size, slot_of(keys_, layer, in.past + row, head));
      const float* value = key + s_.kv_heads * size;
      std::copy(value, value + size, slot_of(values_, layer, in.past + row, head));
    }
    parts.resize(at(s_.heads * size));
    return parts;
  }

  Floats attend(int layer, const Floats& queries, const Inputs& in, int row,
                const std::vector<std::int32_t>& slot_branch) {
    Floats mixed(queries.size());
    for (int head = 0; head < s_.heads; ++head) {
      const int kv_head = head / (s_.heads / s_.kv_heads);
      const float* query = queries.data() + head * s_.head_dim;
      std::vector<std::pair<int, double>> seen;
      for (int slot = 0; slot <= in.past + row; ++slot) {
        const bool own = in.branches[at(row)] >= 0 && slot_branch[at(slot)] == in.branches[at(row)];
        if (slot >= in.visible[at(row)] && !own) continue;
        const float* key = slot_of(keys_, layer, slot, kv_head);
        const double score = std::inner_product(query, query + s_.head_dim, key, 0.0);
        seen.emplace_back(slot, score / std::sqrt(static_cast<double>(s_.head_dim)));
      }
      double greatest = -1e30, total = 0;
      for (const auto& [slot, score] : seen) greatest = std::max(greatest, score);
      for (auto& [slot, score] : seen) total += score = std::exp(score - greatest);
      for (const auto& [slot, weight] : seen)
        for (int i = 0; i < s_.head_dim; ++i)
          mixed[at(head * s_.head_dim + i)] +=
              static_cast<float>(weight / total) * slot_of(values_, layer, slot, kv_head)[i];
    }
    return mixed;
  }

  const Draft& d_;
  const Sizes& s_;
  const bool fine_;
  Floats keys_, values_;  // [layers, capacity, kv_heads, head_dim]
};

// --- the kernels -----------------------------------------------------------------------------------------------------

class Kernels {
 public:
  Kernels(Draft& draft, const char* name, int threads)
      : facts_(draft.facts()),
        draft_(mirror_draft_open(&facts_, name), mirror_draft_close),
        team_(mirror_draft_team_open(threads, threads % 2), mirror_draft_team_close) {
    const auto size = static_cast<std::size_t>(draft.s.kv_heads * capacity * draft.s.head_dim);
    cache_.resize(2 * static_cast<std::size_t>(draft.s.layers), Floats(size));
    for (std::size_t layer = 0; layer < cache_.size(); layer += 2) {
      keys_.push_back(cache_[layer].data());
      values_.push_back(cache_[layer + 1].data());
    }
  }

  bool opened() const { return draft_ != nullptr; }

  Outputs run(const Inputs& in, const std::vector<std::int32_t>& slot_branch, int top) const {
    const auto wanted = in.wanted.size(), all = wanted * static_cast<std::size_t>(top);
    Outputs out{std::vector<std::int64_t>(wanted), std::vector<std::int64_t>(all), Floats(all)};
    const mirror_draft_pass pass{in.width(),
                                 in.past,
                                 capacity,
                                 in.ids.data(),
                                 in.positions.data(),
                                 in.visible.data(),
                                 in.branches.data(),
                                 slot_branch.data(),
                                 keys_.data(),
                                 values_.data(),
                                 static_cast<std::int32_t>(wanted),
                                 in.wanted.data(),
                                 top,
                                 out.tokens.data(),
                                 top ? out.candidates.data() : nullptr,
                                 top ? out.logprobs.data() : nullptr};
    if (mirror_draft_run(draft_.get(), team_.get(), &pass) != 0) throw std::runtime_error("a pass was refused");
    return out;
  }

  // Whether a pass that doesn't fit is refused.
  bool refuses(Inputs in, int past, int capacity_given, std::int64_t wanted_row, int top) const {
    std::vector<std::int64_t> tokens(8), candidates(8);
    Floats logprobs(8);
    const std::vector<std::int32_t> slots(capacity, -1);
    const mirror_draft_pass pass{in.width(),
                                 past,
                                 capacity_given,
                                 in.ids.data(),
                                 in.positions.data(),
                                 in.visible.data(),
                                 in.branches.data(),
                                 slots.data(),
                                 keys_.data(),
                                 values_.data(),
                                 1,
                                 &wanted_row,
                                 top,
                                 tokens.data(),
                                 candidates.data(),
                                 logprobs.data()};
    return mirror_draft_run(draft_.get(), team_.get(), &pass) != 0;
  }

 private:
  mirror_draft_facts facts_;
  std::unique_ptr<mirror_draft, decltype(&mirror_draft_close)> draft_;
  std::unique_ptr<mirror_draft_team, decltype(&mirror_draft_team_close)> team_;
  std::vector<Floats> cache_;
  std::vector<float*> keys_, values_;
};

std::vector<const char*> kernels_here() {
  std::vector<const char*> names;
  for (const char* name : {"amx", "avx512", "avx2"})
    if (mirror_kernels_of(name) != nullptr) names.push_back(name);
  return names;
}

// How many log-probabilities were compared with those of the plain pass, and how many were not the same.
struct Likeness {
  int all = 0, far = 0;
};

// A draft, its plain pass, and the kernels in every instruction set by every team: all run the same passes.
class Bench {
 public:
  Bench(Checks& checks, Likeness& likeness, const Sizes& sizes, unsigned seed)
      : checks_(checks),
        likeness_(likeness),
        draft_(sizes, seed),
        plain_(draft_, sizes.layers > 8),
        coarse_(draft_, false) {
    for (const char* name : kernels_here())
      for (const int threads : {1, 2, 3}) {
        runs_.push_back({name, threads, std::make_unique<Kernels>(draft_, name, threads)});
        checks_.check(runs_.back().kernels->opened(), std::string(name) + " opens the draft");
      }
  }

  Inputs line(int rows, int past) {
    Inputs in;
    in.past = past;
    for (int row = 0; row < rows; ++row) in.row(token(), past + row, past + row + 1, -2);
    return in;
  }

  // One pass of branches: real rows, then streams that it alone sees.
  Inputs tree(int branches, int real, int streams, int base, int past, int read) {
    Inputs in;
    in.past = past;
    for (int branch = 0; branch < branches; ++branch)
      for (int row = 0; row < real + streams; ++row) {
        const int start = base - branch % 3;
        slot_branch_[static_cast<std::size_t>(past + in.width())] = branch;
        if (row >= real - 1) in.wanted.push_back(in.width());
        in.row(row < real ? token() : draft_.s.tokens + row - real, start + read + row, start, branch);
      }
    return in;
  }

  void hide_streams(const Inputs& in) {
    for (int row = 0; row < in.width(); ++row)
      if (in.ids[static_cast<std::size_t>(row)] >= draft_.s.tokens)
        slot_branch_[static_cast<std::size_t>(in.past + row)] = -1;
  }

  void forget_branches() { std::fill(slot_branch_.begin(), slot_branch_.end(), -1); }

  // Runs a pass everywhere, with candidates and without.
  void pass(const Inputs& in, int top, const std::string& what) {
    const std::vector<Floats> logits = plain_.run(in, slot_branch_), coarse = coarse_.run(in, slot_branch_);
    const Outputs *with = nullptr, *without = nullptr;
    std::vector<Outputs> kept;
    kept.reserve(2 * runs_.size());
    std::string last;
    for (const Run& run : runs_) {
      const std::string where = what + ", " + run.name + " by " + std::to_string(run.threads);
      const Outputs& candidates = kept.emplace_back(run.kernels->run(in, slot_branch_, top));
      const Outputs& tokens = kept.emplace_back(run.kernels->run(in, slot_branch_, 0));
      checks_.equal(tokens.tokens, candidates.tokens, where + ": tokens with candidates and without");
      if (last == run.name) {
        checks_.check(candidates == *with && tokens == *without, where + ": other bits than by one thread");
      } else {
        // Matrix units attend in bfloat16.
        const bool amx = run.name == "amx";
        compare(amx ? coarse : logits, candidates, top, amx ? 0.05f : 0.01f, where);
        with = &candidates;
        without = &tokens;
      }
      last = run.name;
    }
  }

  const Kernels& some() const { return *runs_.front().kernels; }

 private:
  struct Run {
    std::string name;
    int threads;
    std::unique_ptr<Kernels> kernels;
  };

  std::int64_t token() { return static_cast<std::int64_t>(draft_.random() % static_cast<unsigned>(draft_.s.tokens)); }

  // A sum in another order may round a number to its neighbour of 8 bits, the more layers the more often: some rows
  // are only near.
  void compare(const std::vector<Floats>& logits, const Outputs& found, int top, float same, const std::string& where) {
    constexpr float near = 0.2f;
    for (std::size_t row = 0; row < logits.size(); ++row) {
      const Floats& all = logits[row];
      double total = 0;
      const float greatest = *std::max_element(all.begin(), all.end());
      for (const float logit : all) total += std::exp(static_cast<double>(logit) - greatest);
      Floats sorted = all;
      std::sort(sorted.rbegin(), sorted.rend());
      const float shift = greatest + static_cast<float>(std::log(total));
      bool good = found.tokens[row] == found.candidates[row * static_cast<std::size_t>(top)];
      for (std::size_t rank = 0; rank < static_cast<std::size_t>(top); ++rank) {
        const std::size_t at = row * static_cast<std::size_t>(top) + rank;
        const std::size_t place = place_of(found.candidates[at]);
        const float own = place < all.size() ? all[place] - shift : -1e30f, ranked = sorted[rank] - shift;
        const float off = std::max(std::abs(found.logprobs[at] - own), std::abs(found.logprobs[at] - ranked));
        good = good && off < near;
        likeness_.all++;
        likeness_.far += off < same ? 0 : 1;
      }
      checks_.check(good, where + ": row " + std::to_string(row) + " has other candidates than the plain pass");
    }
  }

  std::size_t place_of(std::int64_t token) const {
    if (draft_.vocabulary.empty()) return static_cast<std::size_t>(token);
    return static_cast<std::size_t>(std::find(draft_.vocabulary.begin(), draft_.vocabulary.end(), token) -
                                    draft_.vocabulary.begin());
  }

  Checks& checks_;
  Likeness& likeness_;
  Draft draft_;
  Plain plain_, coarse_;  // matrix units round whole rows, others those of few layers only
  std::vector<Run> runs_;
  std::vector<std::int32_t> slot_branch_ = std::vector<std::int32_t>(capacity, -1);
};

// A prompt, a window with candidates, a proposal with streams and two passes of branches, the second by fewer of them.
void check_rounds(Checks& checks, Likeness& likeness, const Sizes& sizes, unsigned seed, int rows) {
  const std::string what = std::to_string(sizes.hidden) + "/" + std::to_string(rows) + " rows";
  Bench bench(checks, likeness, sizes, seed);
  Inputs prompt = bench.line(rows, 0);
  prompt.wanted = {rows - 1};
  bench.pass(prompt, 1, what + ", prompt");
  Inputs window = bench.line(1 + rows % 9, rows);
  for (int row = 0; row < window.width(); ++row) window.wanted.push_back(row);
  bench.pass(window, 5, what + ", window");
  const int base = rows + window.width();
  Inputs proposal = bench.tree(1, 1, sizes.streams, base, base, 0);
  bench.pass(proposal, 2, what + ", proposal");
  bench.forget_branches();
  const int branches = 1 + rows % 13;
  Inputs first = bench.tree(branches, 1, sizes.streams, base, base, 0);
  bench.pass(first, 3, what + ", branches");
  bench.hide_streams(first);
  Inputs second = bench.tree((branches + 1) / 2, 2, 1, base, base + first.width(), 1);
  bench.pass(second, 3, what + ", branches go on");
}

void check_sizes(Checks& checks, const Sizes& sizes, const std::vector<int>& rows) {
  Likeness likeness;
  for (const int count : rows)
    checks.group("rows", [&] { check_rounds(checks, likeness, sizes, static_cast<unsigned>(count), count); });
  checks.check(likeness.all > 0 && 4 * likeness.far < likeness.all,
               std::to_string(sizes.hidden) + ": " + std::to_string(likeness.far) + " log-probabilities of " +
                   std::to_string(likeness.all) + " are others than the plain pass's");
}

void check_refusals(Checks& checks) {
  const Sizes sizes{32, 2, 1, 16, 48, 1, 20};
  Likeness likeness;
  Bench bench(checks, likeness, sizes, 5);
  const Inputs in = bench.line(3, 0);
  checks.check(!bench.some().refuses(in, 0, capacity, 2, 4), "a pass that fits");
  checks.check(bench.some().refuses(in, 0, capacity - 1, 2, 4), "a capacity that isn't whole blocks");
  checks.check(bench.some().refuses(in, capacity - 2, capacity, 2, 4), "rows past the cache's end");
  checks.check(bench.some().refuses(in, 0, capacity, 3, 4), "a wanted row that isn't there");
  checks.check(bench.some().refuses(in, 0, capacity, 2, 21), "more candidates than tokens");
  Draft odd({32, 2, 1, 24, 48, 1, 20}, 1);
  const mirror_draft_facts facts = odd.facts();
  checks.check(mirror_draft_open(&facts, nullptr) == nullptr, "heads of 24 features");
  checks.check(mirror_kernels_of("sse") == nullptr && mirror_draft_open(&facts, "sse") == nullptr, "unknown kernels");
}

}  // namespace

int main() {
  Checks checks;
  if (kernels_here().empty()) {
    std::printf("this CPU or this build has no kernels\n");
    checks.check(mirror_kernels_of(nullptr) == nullptr, "none at all");
    return checks.end();
  }
  checks.check(std::string(mirror_kernels_of(nullptr)) == kernels_here().front(), "the best are chosen");
  for (const char* name : kernels_here()) std::printf("%s\n", name);
  const Sizes plain{48, 3, 1, 16, 80, 2, 67};
  std::vector<int> rows(40);
  std::iota(rows.begin(), rows.end(), 1);
  check_sizes(checks, plain, rows);
  // More layers than other drafts, larger heads, biases and norms, a vocabulary of several parts, tables of all kinds.
  Sizes deep{144, 4, 2, 32, 208, 9, 300, MIRROR_FLOAT16};
  deep.biases = deep.trimmed = true;
  Sizes normed{96, 2, 2, 48, 112, 2, 513, MIRROR_BLOCKS_4};
  normed.head_norms = true;
  Sizes wide{32, 8, 1, 16, 16, 1, 16, MIRROR_BLOCKS_8};
  Sizes large{160, 5, 5, 80, 64, 1, 1000, MIRROR_BFLOAT16};
  large.positions = 20;  // later ones take the last
  for (const Sizes& sizes : {deep, normed, wide, large}) check_sizes(checks, sizes, {1, 7, 33, 63, 100});
  checks.group("refusals", [&] { check_refusals(checks); });
  return checks.end();
}
