// Attention in 32 bits. Keys lie in blocks of 16 slots, [size, 16] each; values as they come, [slots, size].
// Included by files that have defined F16 and how much fits into registers (attention_blocks, mixed_tiles).

namespace {

void put_key(float* keys, int slot, int size, const float* key) {
  float* target = keys + static_cast<int64_t>(slot / 16) * 16 * size + slot % 16;
  for (int i = 0; i < size; i++) target[static_cast<int64_t>(i) * 16] = key[i];
}

void put_value(float* values, int slot, int size, const float* value) {
  for (int i = 0; i < size; i += 16) store(values + static_cast<int64_t>(slot) * size + i, load(value + i));
}

float own_score(const float* query, int size, const float* keys, int slot) {
  const float* key = keys + static_cast<int64_t>(slot / 16) * 16 * size + slot % 16;
  float totals[4] = {};  // apart, so that they need not wait for each other
  for (int i = 0; i < size; i += 4)
    for (int j = 0; j < 4; j++) totals[j] += query[i + j] * key[(i + j) * 16];
  return (totals[0] + totals[1]) + (totals[2] + totals[3]);
}

void add_own_value(float weight, const float* values, int slot, int size, float* mixed) {
  const float* value = values + static_cast<int64_t>(slot) * size;
  for (int i = 0; i < size; i += 16) store(mixed + i, fma(set(weight), load(value + i), load(mixed + i)));
}

// Scores of some queries [rows, size] with all keys of some blocks of 16 slots, to scores [rows, stride].
template <int rows>
void score(const float* queries, int size, const float* keys, int first_block, int blocks, float* scores,
           int64_t stride) {
  int block = first_block;
  for (; block + attention_blocks <= blocks; block += attention_blocks) {
    F16 totals[rows][attention_blocks];
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) MIRROR_UNROLL
    for (int i = 0; i < attention_blocks; i++) totals[row][i] = set(0.0f);
    const float* key = keys + static_cast<int64_t>(block) * 16 * size;
    for (int d = 0; d < size; d++) {
      F16 part[attention_blocks];
      MIRROR_UNROLL
      for (int i = 0; i < attention_blocks; i++) part[i] = load(key + (static_cast<int64_t>(i) * size + d) * 16);
      MIRROR_UNROLL
      for (int row = 0; row < rows; row++) {
        const F16 query = set(queries[row * size + d]);
        MIRROR_UNROLL
        for (int i = 0; i < attention_blocks; i++) totals[row][i] = fma(query, part[i], totals[row][i]);
      }
    }
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) MIRROR_UNROLL
    for (int i = 0; i < attention_blocks; i++) store(scores + row * stride + (block + i) * 16, totals[row][i]);
  }
  for (; block < blocks; block++) {
    F16 totals[rows];
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) totals[row] = set(0.0f);
    const float* key = keys + static_cast<int64_t>(block) * 16 * size;
    for (int d = 0; d < size; d++) {
      const F16 part = load(key + d * 16);
      MIRROR_UNROLL
      for (int row = 0; row < rows; row++) totals[row] = fma(set(queries[row * size + d]), part, totals[row]);
    }
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) store(scores + row * stride + block * 16, totals[row]);
  }
}

// Values [slots, size] weighed by each row's weights [rows, stride], to mixed [rows, size].
template <int rows>
void mix(const float* weights, int64_t stride, const float* values, int slots, int size, float* mixed) {
  for (int from = 0; from < size; from += mixed_tiles * 16) {
    const int tiles = (size - from) / 16 < mixed_tiles ? (size - from) / 16 : mixed_tiles;
    F16 totals[rows][mixed_tiles];
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) MIRROR_UNROLL
    for (int i = 0; i < mixed_tiles; i++) totals[row][i] = set(0.0f);
    if (tiles == mixed_tiles) {
      for (int slot = 0; slot < slots; slot++) {
        const float* value = values + static_cast<int64_t>(slot) * size + from;
        F16 part[mixed_tiles];
        MIRROR_UNROLL
        for (int i = 0; i < mixed_tiles; i++) part[i] = load(value + i * 16);
        MIRROR_UNROLL
        for (int row = 0; row < rows; row++) {
          const F16 weight = set(weights[row * stride + slot]);
          MIRROR_UNROLL
          for (int i = 0; i < mixed_tiles; i++) totals[row][i] = fma(weight, part[i], totals[row][i]);
        }
      }
    } else {
      for (int slot = 0; slot < slots; slot++) MIRROR_UNROLL
      for (int row = 0; row < rows; row++) MIRROR_UNROLL
      for (int i = 0; i < tiles; i++)
        totals[row][i] = fma(set(weights[row * stride + slot]),
                             load(values + static_cast<int64_t>(slot) * size + from + i * 16), totals[row][i]);
    }
    MIRROR_UNROLL
    for (int row = 0; row < rows; row++) MIRROR_UNROLL
    for (int i = 0; i < tiles; i++) store(mixed + row * size + from + i * 16, totals[row][i]);
  }
}

template <int rows>
void score_rows(int count, const float* queries, int size, const float* keys, int blocks, float* scores,
                int64_t stride) {
  if (count == rows) return score<rows>(queries, size, keys, 0, blocks, scores, stride);
  if constexpr (rows > 1) score_rows<rows - 1>(count, queries, size, keys, blocks, scores, stride);
}

template <int rows>
void mix_rows(int count, const float* weights, int64_t stride, const float* values, int slots, int size, float* mixed) {
  if (count == rows) return mix<rows>(weights, stride, values, slots, size, mixed);
  if constexpr (rows > 1) mix_rows<rows - 1>(count, weights, stride, values, slots, size, mixed);
}

void score_all(int count, const float* queries, int size, const float* keys, int blocks, float* scores, int64_t stride,
               float*) {
  score_rows<attention_rows>(count, queries, size, keys, blocks, scores, stride);
}

void mix_all(int count, const float* weights, int64_t stride, const float* values, int slots, int size, float* mixed,
             float*) {
  mix_rows<attention_rows>(count, weights, stride, values, slots, size, mixed);
}

}  // namespace
