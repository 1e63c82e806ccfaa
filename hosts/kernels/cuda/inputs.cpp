#include <cstdint>
#include <vector>

#include "driver.hpp"
#include "embedded.hpp"
#include "operations.hpp"
#include "operator.hpp"

MIRROR_EMBEDDED(mirror_inputs_source, "inputs.cu");

namespace mirror_gpu {
namespace {

constexpr int kThreads = 256;

// One kernel over [rows][width].
class Rowwise : public Node {
 protected:
  Rowwise(const Api& api, Handle info, const char* kernel) : Node(api, info), kernel_(compiled_once(gpu_, mirror_inputs_source, kernel)) {}

  void run(Handle context, std::int64_t rows, std::int64_t width, void** arguments) const {
    if (rows == 0 || width == 0) return;
    const int across = static_cast<int>((width + kThreads - 1) / kThreads);
    launch(kernel_, {across, static_cast<int>(rows), 1}, kThreads, 0, stream(context), arguments);
  }

 private:
  Kernel kernel_;
};

class BranchMask : public Rowwise {
 public:
  BranchMask(const Api& api, Handle info, const Signature&) : Rowwise(api, info, "branch_mask") {}

  void compute(Handle context) const {
    int slots = *reinterpret_cast<const int*>(address(input(context, 0)));
    const std::int64_t rows = shape_of(input(context, 2)).at(0);
    const Handle y = output(context, 0, {1, 1, rows, slots});
    Address at[] = {address(input(context, 1)), address(input(context, 2)), address(input(context, 3)), address(y)};
    void* arguments[] = {&at[0], &at[1], &at[2], &at[3], &slots};
    run(context, rows, slots, arguments);
  }
};

class StreamEmbedding : public Rowwise {
 public:
  StreamEmbedding(const Api& api, Handle info, const Signature&) : Rowwise(api, info, "stream_embedding") {
    vocabulary_ = static_cast<int>(integer(info, "vocabulary"));
  }

  void compute(Handle context) {
    const std::vector<std::int64_t> shape = shape_of(input(context, 1));
    const Handle y = output(context, 0, shape);
    int width = static_cast<int>(shape.back());
    Address at[] = {address(input(context, 0)), address(input(context, 1)), address(input(context, 2)), address(y)};
    void* arguments[] = {&at[0], &at[1], &at[2], &at[3], &width, &vocabulary_};
    run(context, shape.at(0) * shape.at(1), width, arguments);
  }

 private:
  int vocabulary_ = 0;
};

}  // namespace

const CustomOp& branch_mask_operation() {
  static const Operation made = operation_of<BranchMask>({"BranchMask", {kInt32, kInt32, kInt32, kInt32}, 4, 0});
  return made;
}

const CustomOp& stream_embedding_operation() {
  static const Operation made = operation_of<StreamEmbedding>({"StreamEmbedding", {kInt64, kFloat16, kFloat16}, 3});
  return made;
}

}  // namespace mirror_gpu
