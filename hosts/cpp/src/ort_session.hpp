// Segments on ONNX Runtime, for any execution provider.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <functional>
#include <map>

#include "provider.hpp"

namespace mirror {

// The one environment of the process, its usage reports turned off.
Ort::Env& ort_environment();

// Options that every session has.
Ort::SessionOptions session_options(int threads);

// Makes the session of one pass shape; a provider that takes any shape is asked once.
using OpenSession = std::function<Ort::Session(const Graph&, PassShape)>;

// A graph as one session, or as one per compiled shape.
class OrtSegment final : public Segment {
 public:
  // A provider that compiles gets a session for each of `shapes` at once, and for those of `later` when they are
  // first asked for, maybe by another thread and after its device has gone: `open` must own what it needs.
  OrtSegment(const SegmentFacts& facts, const Graph& graph, Provider provider, int capacity, OpenSession open,
             const std::vector<PassShape>& shapes, const std::vector<PassShape>& later);

  const std::vector<int>& widths() const override { return widths_; }
  bool launches() const override { return provider_.stream != nullptr; }
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
