// Segments and caches on ONNX Runtime, for any execution provider. Knows memory and bindings.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <functional>
#include <map>
#include <set>

#include "device.hpp"

namespace mirror {

// The one environment of the process, its usage reports turned off.
Ort::Env& ort_environment();

// One execution provider, as sessions need to know it.
struct Provider {
  std::string name;            // as ONNX Runtime calls it
  std::string device = "cpu";  // as users call it
  Form form = Form::inplace;
  std::string memory;  // ONNX Runtime's name of its memory; empty for host memory
  int index = 0;
  // Whether a session is compiled for each pass shape; else one session takes them all.
  bool compiles = false;
  // Whether its sessions read and write buffers that are bound once, as ONNX Runtime's own providers do.
  // Else they are given their inputs anew at every pass, and what they return is copied.
  bool binds = true;
  // Catalogue inputs by which its kernels choose themselves, in host memory. They get the cache's capacity:
  // another number in the next pass could mean another kernel, and its plan.
  std::set<std::string> sized_inputs;
  std::function<void(void*, std::size_t)> zero;                  // clears its memory
  std::function<std::optional<std::uint64_t>()> free_bytes;      // what is left of it

  bool on_host() const { return memory.empty(); }
};

// A fixed tensor. `host` is its memory where that is the host's, else null.
struct Buffer {
  Ort::Value value{nullptr};
  std::shared_ptr<void> owner;
  std::byte* host = nullptr;
  std::vector<std::int64_t> shape;
  DType dtype = DType::float32;
};

// Options that every session has.
Ort::SessionOptions session_options(int threads);

// Makes the session of one pass shape; a provider that takes any shape is asked once.
using OpenSession = std::function<Ort::Session(const Graph&, PassShape)>;

// A graph as one session, or as one per compiled shape.
class OrtSegment final : public Segment {
 public:
  // `widths`: those that it takes; empty if any. A provider that compiles gets a session for each of
  // `shapes` at once, and for others when first asked for.
  OrtSegment(const SegmentFacts& facts, const Graph& graph, Provider provider, int capacity, OpenSession open,
             std::vector<int> widths, const std::vector<PassShape>& shapes);

  const std::vector<int>& widths() const override { return widths_; }
  std::unique_ptr<BoundPass> bind(PassFeeds& feeds, int rows, const std::shared_ptr<KVCache>& cache) override;
  std::shared_ptr<KVCache> make_cache() override;

 private:
  const std::shared_ptr<Ort::Session>& session(PassShape shape);
  PassShape covering(PassShape wanted) const;
  bool takes_rows() const { return graph_.input("logit_rows") != nullptr; }

  SegmentFacts facts_;
  Graph graph_;
  Provider provider_;
  int capacity_;
  OpenSession open_;
  std::vector<int> widths_;
  std::map<PassShape, std::shared_ptr<Ort::Session>> sessions_;
};

// The graph of a form. Throws Error(device) naming the forms that the bundle has.
const Graph& graph_of(const SegmentFacts& facts, Form form, const std::string& device);

}  // namespace mirror
