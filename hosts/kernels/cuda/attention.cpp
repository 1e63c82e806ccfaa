#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "driver.hpp"
#include "embedded.hpp"
#include "operations.hpp"
#include "operator.hpp"
#include "workspace.hpp"

MIRROR_EMBEDDED(mirror_attention_source, "attention.cu");

namespace mirror_gpu {
namespace {

// As attention.cu has them.
constexpr int kThreads = 128, kSlots = 64, kQueries = 16, kMostParts = 64;
constexpr int kBlocksOfMultiprocessor = 4;  // that there are about as many parts for
constexpr int kHeadStep = 64, kLargestHead = 256;
constexpr int kFirstCapability = 8;
// More rows are a prompt's, for which ONNX Runtime's kernels are made; those with a mask of their own are a draft's.
constexpr int kMostRows = 16, kMostMaskedRows = 1024;

enum Input : std::size_t {
  kQuery,
  kKey,
  kValue,
  kPastKey,
  kPastValue,
  kSlotsFilled,
  kTotal,
  kCosines,
  kSines,
  kPositions,
  kBias,
  kKnownInputs
};

struct Kind {
  int head, group;
  bool rotary, bias;
};

class Kernels {
 public:
  Kernel compiled(const Gpu& gpu, const Kind& kind) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Kernel& found = kernels_[{gpu.index, kind.head, kind.group, kind.rotary, kind.bias}];
    if (found == nullptr)
      found = compile(gpu, mirror_attention_source,
                      {define("HEAD", kind.head), define("GROUP", kind.group), define("ROTARY", kind.rotary),
                       define("BIAS", kind.bias)},
                      "attention", shared_bytes(kind.head));
    return found;
  }

  static int shared_bytes(int head) { return 2 * kSlots * (head + 8) * 2; }

 private:
  std::mutex mutex_;
  std::map<std::array<int, 5>, Kernel> kernels_;
};

Kernels& kernels() {
  static Kernels* const made = new Kernels;  // sessions may end after static objects do
  return *made;
}

class Attention : public Node {
 public:
  Attention(const Api& api, Handle info, const Signature&) : Node(api, info) {
    const std::int64_t heads = integer(info, "num_heads"), key_heads = integer(info, "kv_num_heads");
    const std::int64_t rotary = integer(info, "do_rotary", 0), interleaved = integer(info, "rotary_interleaved", 0);
    const std::int64_t window = integer(info, "local_window_size", -1), smooth = integer(info, "smooth_softmax", 0);
    const float softcap = number(info, "softcap", 0);
    scale_ = number(info, "scale", 0);
    make_built_in(info, "GroupQueryAttention",
                  {{"num_heads", heads},
                   {"kv_num_heads", key_heads},
                   {"do_rotary", rotary},
                   {"rotary_interleaved", interleaved},
                   {"local_window_size", window},
                   {"smooth_softmax", smooth}},
                  {{"scale", scale_}, {"softcap", softcap}},
                  {{{"T", kFloat16}, {"T_CACHE", kFloat16}, {"M", kInt32}, {"T_KV_SCALE", kFloat}},
                   {{"T", kFloat16}, {"T_CACHE", kFloat16}, {"M", kInt32}},
                   {{"T", kFloat16}, {"M", kInt32}}},
                  3);
    heads_ = static_cast<int>(heads);
    key_heads_ = static_cast<int>(key_heads);
    rotary_ = rotary != 0;
    known_ = inputs_ <= kKnownInputs && interleaved == 0 && window < 0 && smooth <= 0 && softcap == 0 &&
             heads % key_heads == 0 && gpu_.major >= kFirstCapability;
    // At most so many thread blocks have a part, whatever the pass.
    if (known_)
      plan_workspace(static_cast<std::size_t>(most_blocks()) * kQueries * (kLargestHead + 2),
                     static_cast<std::size_t>(most_blocks()));
  }

  void compute(Handle context) {
    const std::vector<std::int64_t> rows = shape_of(input(context, kQuery));
    const std::vector<std::int64_t> cache = shape_of(input(context, kPastKey));
    const Handle keys = output(context, 1, cache), values = output(context, 2, cache);
    const Handle y = output(context, 0, {rows[0], rows[1], heads_ * cache[3]});
    if (takes(context, rows, cache, keys, values))
      attend(context, static_cast<int>(rows[1]), cache, y);
    else
      invoke_built_in(context, {y, keys, values});
  }

 private:
  bool takes(Handle context, const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& cache, Handle keys,
             Handle values) const {
    const std::int64_t head = cache[3];
    const Handle bias = input(context, kBias);
    if (!known_ || rows[0] != 1 || cache[0] != 1 || rows[1] < 1) return false;
    if (rows[1] > (bias != nullptr ? kMostMaskedRows : kMostRows)) return false;
    if (head % kHeadStep != 0 || head > kLargestHead ||
        Kernels::shared_bytes(static_cast<int>(head)) > gpu_.shared_of_block)
      return false;
    if (address(keys) != address(input(context, kPastKey)) || address(values) != address(input(context, kPastValue)))
      return false;
    if (rotary_ && shape_of(input(context, kCosines)).at(1) * 2 != head) return false;
    if (bias == nullptr) return true;
    const std::vector<std::int64_t> shape = shape_of(bias);
    return shape[0] == 1 && shape[1] == 1 && shape[2] == rows[1];
  }

  int most_blocks() const { return kBlocksOfMultiprocessor * gpu_.multiprocessors; }

  void attend(Handle context, int rows, const std::vector<std::int64_t>& cache, Handle y) const {
    const int head = static_cast<int>(cache[3]), group = heads_ / key_heads_;
    int capacity = static_cast<int>(cache[2]);
    const Stream on = stream(context);
    const Handle bias = input(context, kBias);
    const Kernel kernel = kernels().compiled(gpu_, {head, group, rotary_, bias != nullptr});
    const int tiles = divided_up(rows * group, kQueries);
    // By pass and GPU alone, since each number of parts rounds otherwise.
    const int parts =
        std::clamp(most_blocks() / (key_heads_ * tiles), 1, std::min(kMostParts, divided_up(capacity, kSlots)));
    const Workspace memory = workspace(gpu_.index, on);
    const Handle key = input(context, kKey);
    Address q = address(input(context, kQuery)), k = address(key), v = address(input(context, kValue));
    int q_stride = heads_ * head, kv_stride = key_heads_ * head;
    if (key == nullptr) {  // all three side by side
      k = q + static_cast<Address>(q_stride) * 2;
      v = k + static_cast<Address>(kv_stride) * 2;
      q_stride = kv_stride = (heads_ + 2 * key_heads_) * head;
    }
    Address at[] = {address(input(context, kPastKey)),
                    address(input(context, kPastValue)),
                    address(input(context, kCosines)),
                    address(input(context, kSines)),
                    address(input(context, kPositions)),
                    address(bias),
                    address(input(context, kSlotsFilled)),
                    address(y),
                    memory.sums_at,
                    memory.tickets_at};
    int bias_stride = bias != nullptr ? static_cast<int>(shape_of(bias)[3]) : 0;
    float scale = scale_ != 0 ? scale_ : 1 / std::sqrt(static_cast<float>(head));
    void* arguments[] = {&q,     &k,           &v,     &q_stride, &kv_stride, &at[0], &at[1], &at[2], &at[3],   &at[4],
                         &at[5], &bias_stride, &at[6], &at[7],    &at[8],     &at[9], &scale, &rows,  &capacity};
    launch(kernel, {key_heads_, parts, tiles}, kThreads, Kernels::shared_bytes(head), on, arguments);
  }

  int heads_ = 0, key_heads_ = 0;
  bool rotary_ = false, known_ = false;
  float scale_ = 0;
};

}  // namespace

const CustomOp& attention_operation() {
  static const Operation made = operation_of<Attention>(
      {"GroupQueryAttention",
       {kFloat16, kFloat16, kFloat16, kFloat16, kFloat16, kInt32, kInt32, kFloat16, kFloat16, kInt64, kFloat16},
       1,
       kTotal,
       3});
  return made;
}

}  // namespace mirror_gpu
