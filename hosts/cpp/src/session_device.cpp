#include "session_device.hpp"

#include "error.hpp"

namespace mirror {
namespace {

// What a GPU must compute itself: on the CPU it would copy the whole cache there and back in every layer.
void check_attention(const Ort::Session& session, const Graph& graph, const Provider& provider) {
  for (const auto& part : session.GetEpGraphAssignmentInfo()) {
    if (part.GetEpName() == provider.name) continue;
    for (const auto& node : part.GetNodes())
      if (node.GetOperatorType() == "GroupQueryAttention")
        throw Error(ErrorKind::device, provider.device + " computes attention in fp16 and bf16, and " + graph.file +
                                           " needs it in float32; export the bundle with --precision fp16, bf16, "
                                           "int8-fp16 or int4-fp16");
  }
}

// Opens a graph's session, or says which device couldn't.
Ort::Session open_session(const std::filesystem::path& folder, const Graph& graph, const Ort::SessionOptions& options,
                          const Provider& provider) {
  try {
    Ort::Session session(ort_environment(), (folder / std::filesystem::u8path(graph.file)).c_str(), options);
    if (!provider.memory.empty()) check_attention(session, graph, provider);
    return session;
  } catch (const Ort::Exception& error) {
    throw Error(ErrorKind::device, provider.device + " can't load " + graph.file + ": " + error.what());
  }
}

}  // namespace

std::unique_ptr<Segment> SessionDevice::load_segment(const std::filesystem::path& folder, const SegmentFacts& facts,
                                                     int capacity, const std::vector<PassShape>& shapes,
                                                     const std::vector<PassShape>& later, int threads) {
  // Copies: a draft's thread opens sessions for later shapes when this device may be gone.
  const auto open = [provider = provider_, configure = configure_, folder, facts, capacity, threads](const Graph& graph,
                                                                                                     PassShape shape) {
    Ort::SessionOptions options = session_options(threads);
    if (provider.compiles)
      for (const auto& [dimension, size] :
           {std::pair{"width", shape.width}, std::pair{"rows", shape.rows}, std::pair{"capacity", capacity}})
        options.AddFreeDimensionOverrideByName(dimension, size);
    configure(options, facts, threads, capacity);
    return open_session(folder, graph, options, provider);
  };
  return std::make_unique<OrtSegment>(facts, graph_of(facts, provider_.form, name()), provider_, capacity, open, shapes,
                                      later);
}

}  // namespace mirror
