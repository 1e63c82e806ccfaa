// The steps of a pass, for one instruction set. Included by a file that is compiled for it and that has defined, in an
// unnamed namespace:
//
//   F16                16 floats: load, store, set, fma, plus, minus, times, over, most, least, exp2_of, sum, largest
//   multiply(...)      rounded rows times tiles of a matrix
//   attention_rows     queries that attention takes at once
//   put_key, put_value, score_all, mix_all, own_score, add_own_value   attention over a cache in an order of its own
//
// Everything stays in that namespace: an inline function with external linkage could be taken by the linker for a
// caller on another CPU.

namespace {

using namespace mirror_kernels;

constexpr float hidden_score = -1e30f;

F16 exp_of(F16 x) { return exp2_of(times(most(least(x, set(88.0f)), set(-87.0f)), set(1.44269504088896341f))); }

// Does a step's work together with the other threads; false if the pass is over.
template <typename Body>
bool share(Turn& turn, int units, Body body) {
  for (int unit; turn.claim(units, unit);) {
    body(unit);
    turn.done();
  }
  return turn.next(units);
}

// --- rows ------------------------------------------------------------------------------------------------------------

float half_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, rest = bits & 1023;
  union {
    uint32_t bits;
    float number;
  } result;
  if (exponent == 0) {
    result.number = static_cast<float>(rest) * (1.0f / 16777216.0f);
    result.bits |= sign;
  } else {
    result.bits = sign | (exponent == 31 ? 255u << 23 : (exponent + 112) << 23) | rest << 13;
  }
  return result.number;
}

float stored_float(const void* values, int kind, int64_t index) {
  if (kind == MIRROR_FLOAT32) return static_cast<const float*>(values)[index];
  const uint16_t bits = static_cast<const uint16_t*>(values)[index];
  if (kind == MIRROR_FLOAT16) return half_to_float(bits);
  union {
    uint32_t bits;
    float number;
  } wide;
  wide.bits = static_cast<uint32_t>(bits) << 16;
  return wide.number;
}

void embed(const Draft& draft, int64_t id, float* x) {
  const int hidden = draft.hidden;
  if (id >= draft.tokens && draft.streams > 0) {
    const int64_t stream = id - draft.tokens < draft.streams ? id - draft.tokens : draft.streams - 1;
    for (int i = 0; i < hidden; i++) x[i] = draft.stream_rows[stream * hidden + i];
    return;
  }
  const int64_t row = id < 0 ? 0 : id < draft.tokens ? id : draft.tokens - 1;
  const mirror_embedding& table = draft.embedding;
  if (table.kind != MIRROR_BLOCKS_4 && table.kind != MIRROR_BLOCKS_8) {
    for (int i = 0; i < hidden; i++) x[i] = stored_float(table.values, table.kind, row * hidden + i);
    return;
  }
  const uint8_t* bytes = static_cast<const uint8_t*>(table.values);
  const int blocks = (hidden + 31) / 32;
  const bool narrow = table.kind == MIRROR_BLOCKS_4;
  const int64_t row_bytes = static_cast<int64_t>(blocks) * (narrow ? 16 : 32);
  for (int i = 0; i < hidden; i++) {
    const float scale = stored_float(table.scales, table.scale_kind, row * blocks + i / 32);
    const uint8_t byte = bytes[row * row_bytes + (narrow ? i / 2 : i)];
    const int number = narrow ? (i % 2 ? byte >> 4 : byte & 15) - 8 : byte - 128;
    x[i] = scale * static_cast<float>(number);
  }
}

// Rounds a row [size], times `factor` and a weight each, to 8 bits plus 128; writes the scale, or one for each 64
// numbers.
void round_row(const Work& work, int row, bool fine, const float* x, const float* weights, float factor, int size) {
  uint8_t* rounded = work.rounded + static_cast<int64_t>(row) * work.rounded_stride;
  float* scales = work.row_scales + static_cast<int64_t>(row) * work.scale_stride;
  const int block = fine ? padded_inputs : size;
  for (int first = 0; first < size; first += block) {
    const int end = first + block < size ? first + block : size;
    F16 largest_of = set(1e-20f);
    for (int i = first; i < end; i += 16) {
      const F16 value = weights ? times(load(x + i), load(weights + i)) : load(x + i);
      largest_of = most(largest_of, magnitude(value));
    }
    const float top = largest(largest_of);
    const F16 inverse = set(127.0f / top);
    for (int i = first; i < end; i += 16) {
      const F16 value = weights ? times(load(x + i), load(weights + i)) : load(x + i);
      store_rounded(rounded + i, times(value, inverse));
    }
    *scales++ = top * factor / 127.0f;
  }
  for (int i = size; i < up_to(size, padded_inputs); i++) rounded[i] = 128;
}

float norm_factor(const float* x, int size, float epsilon) {
  F16 squares = set(0.0f);
  for (int i = 0; i < size; i += 16) squares = fma(load(x + i), load(x + i), squares);
  return 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(size) + epsilon);
}

void norm_and_round(const Draft& draft, const Work& work, const float* x, const float* weights, int row) {
  const float factor = norm_factor(x, draft.hidden, draft.epsilon);
  round_row(work, row, draft.fine, x, weights, factor, draft.hidden);
}

// --- products --------------------------------------------------------------------------------------------------------

struct Split {
  int blocks, rows;  // of rows: how many, and how many rows each
};

// Parts of the rows, so that `columns` units of work become enough for all threads.
Split split_rows(int rows, int columns, int threads, int least) {
  int blocks = (2 * threads + columns - 1) / columns;
  const int most_blocks = (rows + least - 1) / least;
  if (blocks > most_blocks) blocks = most_blocks;
  if (blocks < 1) blocks = 1;
  const int each = (rows + blocks - 1) / blocks;
  return {(rows + each - 1) / each, each};
}

// Tiles of a unit of work: the most of 4, 2, 1 that keep all threads busy.
int tiles_per_unit(int tiles, int threads) {
  int chosen = 1;
  int64_t least = INT64_MAX;
  for (int each = 4; each >= 1; each /= 2) {
    const int units = (tiles + each - 1) / each;
    const int64_t rounds = (units + threads - 1) / threads;
    // A narrow unit reads its rows as often as a wide one.
    const int64_t cost = rounds * (4 * each + 1);
    if (cost < least) {
      least = cost;
      chosen = each;
    }
  }
  return chosen;
}

// One part of the heads of q, k and v: turns them and puts them where attention looks for them.
void place_head(const Draft& draft, const Work& work, const mirror_draft_pass& pass, const Layer& layer, int number,
                int head, int row, float* part) {
  const int size = draft.head_dim, half = size / 2, slot = pass.past + row;
  const bool is_query = head < draft.heads, is_key = !is_query && head < draft.heads + draft.kv_heads;
  const float* norm = is_query ? layer.query_norm : is_key ? layer.key_norm : nullptr;
  if (norm) {
    const float factor = norm_factor(part, size, draft.epsilon);
    for (int i = 0; i < size; i++) part[i] *= factor * norm[i];
  }
  if (is_query || is_key) {
    int64_t position = pass.positions[row];
    position = position < 0 ? 0 : position < draft.positions ? position : draft.positions - 1;
    const float *cosines = draft.cosines + position * half, *sines = draft.sines + position * half;
    const float factor = is_query ? draft.scale : 1.0f;
    for (int i = 0; i < half; i++) {
      const float first = part[i] * factor, second = part[half + i] * factor;
      part[i] = first * cosines[i] - second * sines[i];
      part[half + i] = second * cosines[i] + first * sines[i];
    }
  }
  if (is_query) {
    const int group = draft.group(), kv_head = head / group;
    float* target = work.queries + ((static_cast<int64_t>(kv_head) * pass.width + row) * group + head % group) * size;
    for (int i = 0; i < size; i += 16) store(target + i, load(part + i));
  } else if (is_key) {
    const int64_t base = static_cast<int64_t>(head - draft.heads) * pass.capacity * size;
    put_key(pass.keys[number] + base, slot, size, part);
  } else {
    const int64_t base = static_cast<int64_t>(head - draft.heads - draft.kv_heads) * pass.capacity * size;
    put_value(pass.values[number] + base, slot, size, part);
  }
}

bool project_heads(const Draft& draft, const Work& work, const mirror_draft_pass& pass, Turn& turn, int number,
                   float* scratch) {
  const Layer& layer = draft.layers[number];
  const int heads = draft.heads + 2 * draft.kv_heads, size = draft.head_dim, tiles = size / tile_columns;
  const Split rows = split_rows(pass.width, heads, turn.threads(), 16);
  return share(turn, heads * rows.blocks, [&](int unit) {
    const int head = unit % heads, first = unit / heads * rows.rows;
    const int count = pass.width - first < rows.rows ? pass.width - first : rows.rows;
    for (int done = 0; done < count; done += 32) {
      const int some = count - done < 32 ? count - done : 32;
      multiply(work, first + done, some, layer.qkv, head * tiles, tiles, scratch, size, false);
      for (int row = 0; row < some; row++)
        place_head(draft, work, pass, layer, number, head, first + done + row, scratch + row * size);
    }
  });
}

// x += rounded rows times a matrix.
bool project_back(const Work& work, const mirror_draft_pass& pass, Turn& turn, const Matrix& matrix, float* x) {
  const int each = tiles_per_unit(matrix.tiles, turn.threads());
  const int columns = (matrix.tiles + each - 1) / each;
  const Split rows = split_rows(pass.width, columns, turn.threads(), 32);
  return share(turn, columns * rows.blocks, [&](int unit) {
    const int tile = unit % columns * each, first = unit / columns * rows.rows;
    const int count = pass.width - first < rows.rows ? pass.width - first : rows.rows;
    const int tiles = matrix.tiles - tile < each ? matrix.tiles - tile : each;
    multiply(work, first, count, matrix, tile, tiles,
             x + static_cast<int64_t>(first) * matrix.out + tile * tile_columns, matrix.out, true);
  });
}

bool project_gates(const Draft& draft, const Work& work, const mirror_draft_pass& pass, Turn& turn,
                   const Matrix& matrix, float* scratch) {
  const int pairs = draft.inner / tile_columns;
  int each = tiles_per_unit(pairs, turn.threads());
  if (each > 2) each = 2;
  const int columns = (pairs + each - 1) / each;
  const Split rows = split_rows(pass.width, columns, turn.threads(), 32);
  float *gates = scratch, *ups = scratch + 32 * 32;
  return share(turn, columns * rows.blocks, [&](int unit) {
    const int tile = unit % columns * each, begin = unit / columns * rows.rows;
    const int end = begin + rows.rows < pass.width ? begin + rows.rows : pass.width;
    const int tiles = pairs - tile < each ? pairs - tile : each, width = tiles * tile_columns;
    for (int first = begin; first < end; first += 32) {
      const int count = end - first < 32 ? end - first : 32;
      multiply(work, first, count, matrix, tile, tiles, gates, width, false);
      multiply(work, first, count, matrix, pairs + tile, tiles, ups, width, false);
      for (int row = 0; row < count; row++) {
        float* target = work.inner + static_cast<int64_t>(first + row) * draft.inner + tile * tile_columns;
        for (int i = 0; i < width; i += 16) {
          const F16 gate = load(gates + row * width + i), up = load(ups + row * width + i);
          const F16 opened = over(gate, plus(set(1.0f), exp_of(minus(set(0.0f), gate))));
          store(target + i, times(opened, up));
        }
      }
    }
  });
}

// --- attention -------------------------------------------------------------------------------------------------------

// The branch's slots that a row sees past the trunk's, to `seen`; returns how many.
int own_slots(const Work& work, const mirror_draft_pass& pass, int row, int visible, int32_t* seen) {
  const int branch = pass.row_branch[row];
  if (branch < 0 || branch >= work.branches.branches) return 0;
  int count = 0;
  for (int i = work.branches.starts[branch]; i < work.branches.starts[branch + 1]; i++) {
    const int slot = work.branches.slots[i];
    if (slot > pass.past + row) break;
    if (slot >= visible) seen[count++] = slot;
  }
  return count;
}

int trunk_slots(const mirror_draft_pass& pass, int row) {
  const int own = pass.past + row + 1, visible = pass.visible[row];
  return visible < 0 ? 0 : visible < own ? visible : own;
}

struct Unit {
  int kv_head, query, count;  // of the queries [width * group] of a key head
};

// Attention of some queries of one key head.
void attend_unit(const Draft& draft, const Work& work, const mirror_draft_pass& pass, int number, Unit unit,
                 float* scratch) {
  const int size = draft.head_dim, group = draft.group();
  const int64_t head_floats = static_cast<int64_t>(unit.kv_head) * pass.capacity * size;
  const float *keys = pass.keys[number] + head_floats, *values = pass.values[number] + head_floats;
  const float* queries = work.queries + (static_cast<int64_t>(unit.kv_head) * pass.width * group + unit.query) * size;
  const int64_t stride = up_to(pass.capacity, 16) + 16;
  float* scores = scratch;
  float* mixed = scores + attention_rows * stride;
  float* own_scores = mixed + attention_rows * size;
  const int most_own = work.branches.most;
  int32_t* seen = reinterpret_cast<int32_t*>(own_scores + attention_rows * most_own);
  // Aligned, behind all of these.
  float* rest = scratch + up_to(static_cast<int>(attention_rows * (stride + size + 2 * most_own)), 16);
  int slots = 0;
  for (int i = 0; i < unit.count; i++) {
    const int visible = trunk_slots(pass, (unit.query + i) / group);
    if (visible > slots) slots = visible;
  }
  const int blocks = (slots + 15) / 16;
  score_all(unit.count, queries, size, keys, blocks, scores, stride, rest);
  float totals[attention_rows];
  int owns[attention_rows];
  // What a row sees of its own branch is few: one by one, and mixed in at the end.
  for (int i = 0; i < unit.count; i++) {
    const int row = (unit.query + i) / group, visible = trunk_slots(pass, row);
    float* mine = scores + i * stride;
    for (int slot = visible; slot < blocks * 16; slot++) mine[slot] = hidden_score;
    int32_t* slots_of = seen + i * most_own;
    float* own = own_scores + i * most_own;
    owns[i] = own_slots(work, pass, row, visible, slots_of);
    F16 top = set(hidden_score);
    for (int slot = 0; slot < blocks * 16; slot += 16) top = most(top, load(mine + slot));
    float greatest = largest(top);
    for (int j = 0; j < owns[i]; j++) {
      own[j] = own_score(queries + i * size, size, keys, slots_of[j]);
      if (own[j] > greatest) greatest = own[j];
    }
    const F16 shift = set(greatest);
    F16 sums = set(0.0f);
    for (int slot = 0; slot < blocks * 16; slot += 16) {
      // exp_of ends at -87: what a row doesn't see must be nothing.
      const F16 value = kept_if_above(exp_of(minus(load(mine + slot), shift)), load(mine + slot), hidden_score);
      store(mine + slot, value);
      sums = plus(sums, value);
    }
    float total = sum(sums);
    for (int j = 0; j < owns[i]; j++) {
      own[j] = first_of(exp_of(set(own[j] - greatest)));
      total += own[j];
    }
    totals[i] = total > 0 ? 1.0f / total : 0.0f;
  }
  mix_all(unit.count, scores, stride, values, slots, size, mixed, rest);
  for (int i = 0; i < unit.count; i++) {
    const int row = (unit.query + i) / group, head = unit.kv_head * group + (unit.query + i) % group;
    float* mine = mixed + i * size;
    for (int j = 0; j < owns[i]; j++)
      add_own_value(own_scores[i * most_own + j], values, seen[i * most_own + j], size, mine);
    float* target = work.mixed + (static_cast<int64_t>(row) * draft.heads + head) * size;
    for (int d = 0; d < size; d += 16) store(target + d, times(load(mine + d), set(totals[i])));
  }
}

bool attend(const Draft& draft, const Work& work, const mirror_draft_pass& pass, Turn& turn, int number,
            float* scratch) {
  const int queries = pass.width * draft.group();
  int each = attention_rows;
  while (each > 1 && (queries + each - 1) / each * draft.kv_heads < turn.threads()) each--;
  const int blocks = (queries + each - 1) / each;
  return share(turn, blocks * draft.kv_heads, [&](int unit) {
    const int query = unit / draft.kv_heads * each;
    const int count = queries - query < each ? queries - query : each;
    attend_unit(draft, work, pass, number, {unit % draft.kv_heads, query, count}, scratch);
  });
}

// --- the end ---------------------------------------------------------------------------------------------------------

int head_parts(const Draft& draft) { return (draft.head.tiles + head_tiles - 1) / head_tiles; }

// The greatest logit of each wanted row in each part of the vocabulary, and the first place that has it.
bool best_of_parts(const Draft& draft, const Work& work, const mirror_draft_pass& pass, Turn& turn, float* scratch) {
  const Matrix& head = draft.head;
  return share(turn, head_parts(draft), [&](int unit) {
    const int tile = unit * head_tiles;
    const int tiles = head.tiles - tile < head_tiles ? head.tiles - tile : head_tiles, width = tiles * tile_columns;
    const int past_end = head.out - tile * tile_columns < width ? head.out - tile * tile_columns : width;
    float* best = work.best + static_cast<int64_t>(unit) * pass.wanted;
    int32_t* places = work.best_places + static_cast<int64_t>(unit) * pass.wanted;
    for (int first = 0; first < pass.wanted; first += 32) {
      const int count = pass.wanted - first < 32 ? pass.wanted - first : 32;
      multiply(work, first, count, head, tile, tiles, scratch, width, false);
      for (int row = 0; row < count; row++) {
        const float* mine = scratch + row * width;
        F16 top = set(hidden_score);
        int i = 0;
        for (; i + 16 <= past_end; i += 16) top = most(top, load(mine + i));
        float greatest = largest(top);
        for (; i < past_end; i++) greatest = mine[i] > greatest ? mine[i] : greatest;
        for (i = 0; i + 1 < past_end && mine[i] != greatest; i++) {
        }
        best[first + row] = greatest;
        places[first + row] = tile * tile_columns + i;
      }
    }
  });
}

bool all_logits(const Draft& draft, const Work& work, const mirror_draft_pass& pass, Turn& turn) {
  const Matrix& head = draft.head;
  const int width = head.tiles * tile_columns;
  return share(turn, head_parts(draft), [&](int unit) {
    const int tile = unit * head_tiles;
    const int tiles = head.tiles - tile < head_tiles ? head.tiles - tile : head_tiles;
    multiply(work, 0, pass.wanted, head, tile, tiles, work.logits + tile * tile_columns, width, false);
  });
}

int64_t token_at(const Draft& draft, int place) { return draft.vocabulary ? draft.vocabulary[place] : place; }

void choose_likeliest(const Draft& draft, const Work& work, const mirror_draft_pass& pass, int row) {
  float greatest = work.best[row];
  int place = work.best_places[row];
  for (int part = 1; part < head_parts(draft); part++) {
    const int64_t at = static_cast<int64_t>(part) * pass.wanted + row;
    if (work.best[at] <= greatest) continue;
    greatest = work.best[at];
    place = work.best_places[at];
  }
  pass.token_ids[row] = token_at(draft, place);
}

// Places by their logits, a heap whose top is the last in order: the least logit, the later place on ties.
struct Heap {
  float* scores;
  int64_t* places;
  int count;

  MIRROR_INLINE bool goes_before(float score, int64_t place, int other) const {
    return score > scores[other] || (score == scores[other] && place < places[other]);
  }

  // Puts a place where another was, and lets it sink to where it belongs.
  MIRROR_INLINE void put(int at, float score, int64_t place) {
    for (int child = 2 * at + 1; child < count; child = 2 * at + 1) {
      if (child + 1 < count && goes_before(scores[child], places[child], child + 1)) child++;
      if (!goes_before(score, place, child)) break;
      scores[at] = scores[child];
      places[at] = places[child];
      at = child;
    }
    scores[at] = score;
    places[at] = place;
  }
};

// The `top` greatest of a row's logits, falling, the first place on ties, and their log-probabilities.
void choose_candidates(const Draft& draft, const Work& work, const mirror_draft_pass& pass, int row) {
  const int width = draft.head.tiles * tile_columns, size = draft.head.out, top = pass.top;
  float* logits = work.logits + static_cast<int64_t>(row) * width;
  for (int i = size; i < width; i++) logits[i] = hidden_score;
  int64_t* ids = pass.candidate_ids + static_cast<int64_t>(row) * top;
  float* scores = pass.candidate_logprobs + static_cast<int64_t>(row) * top;
  Heap heap{scores, ids, top};
  for (int i = 0; i < top; i++) {
    scores[i] = logits[i];
    ids[i] = i;
  }
  for (int i = top / 2 - 1; i >= 0; i--) heap.put(i, scores[i], ids[i]);
  for (int i = top / 16 * 16; i < width; i += 16) {
    uint32_t above = above_bar(load(logits + i), scores[0]);
    while (above) {
      const int place = i + __builtin_ctz(above);
      above &= above - 1;
      if (place >= top && logits[place] > scores[0]) heap.put(0, logits[place], place);
    }
  }
  while (heap.count > 1) {
    const float score = scores[0];
    const int64_t place = ids[0];
    heap.count--;
    heap.put(0, scores[heap.count], ids[heap.count]);
    scores[heap.count] = score;
    ids[heap.count] = place;
  }
  const float greatest = scores[0];
  const F16 shift = set(greatest);
  F16 sums = set(0.0f);
  for (int i = 0; i < width; i += 16) {
    const F16 logit = load(logits + i);
    sums = plus(sums, kept_if_above(exp_of(minus(logit, shift)), logit, hidden_score));
  }
  const float total = greatest + __builtin_logf(sum(sums));
  for (int i = 0; i < top; i++) {
    scores[i] -= total;
    ids[i] = token_at(draft, static_cast<int>(ids[i]));
  }
  pass.token_ids[row] = ids[0];
}

// One thread's way through the layers of a pass, to the rounded states of the wanted rows; false if the pass is over.
bool run_layers(const Draft& draft, const Work& work, const mirror_draft_pass& pass, Turn& turn, float* scratch) {
  const int width = pass.width, hidden = draft.hidden, all_heads = draft.heads * draft.head_dim;
  const int each = width >= 8 * turn.threads() ? 4 : 1;  // rows of a unit
  const auto by_rows = [&](auto do_row) {
    return share(turn, (width + each - 1) / each, [&](int unit) {
      for (int row = unit * each; row < width && row < (unit + 1) * each; row++) do_row(row);
    });
  };
  const auto round_rows = [&](const float* rows, int size) {
    return by_rows([&](int row) {
      round_row(work, row, draft.fine, rows + static_cast<int64_t>(row) * size, nullptr, 1.0f, size);
    });
  };
  const auto norm_rows = [&](const float* weights) {
    return by_rows(
        [&](int row) { norm_and_round(draft, work, work.x + static_cast<int64_t>(row) * hidden, weights, row); });
  };
  bool going = by_rows([&](int row) { embed(draft, pass.ids[row], work.x + static_cast<int64_t>(row) * hidden); });
  for (int number = 0; going && number < draft.layer_count; number++) {
    const Layer& layer = draft.layers[number];
    going = norm_rows(layer.attention_norm) && project_heads(draft, work, pass, turn, number, scratch) &&
            attend(draft, work, pass, turn, number, scratch) && round_rows(work.mixed, all_heads) &&
            project_back(work, pass, turn, layer.output, work.x) && norm_rows(layer.mlp_norm) &&
            project_gates(draft, work, pass, turn, layer.gate_up, scratch) && round_rows(work.inner, draft.inner) &&
            project_back(work, pass, turn, layer.down, work.x);
  }
  return going && share(turn, pass.wanted, [&](int row) {
           norm_and_round(draft, work, work.x + pass.wanted_rows[row] * hidden, draft.norm, row);
         });
}

void run_pass(const Draft& draft, const Work& work, const mirror_draft_pass& pass, Turn& turn) {
  float* scratch = work.scratch + turn.thread() * work.scratch_size;
  begin_thread();
  if (run_layers(draft, work, pass, turn, scratch) && pass.wanted > 0) {
    if (pass.top == 0 && best_of_parts(draft, work, pass, turn, scratch))
      share(turn, pass.wanted, [&](int row) { choose_likeliest(draft, work, pass, row); });
    else if (pass.top > 0 && all_logits(draft, work, pass, turn))
      share(turn, pass.wanted, [&](int row) { choose_candidates(draft, work, pass, row); });
  }
  end_thread();
}

}  // namespace
