// Devices for tests: the CPU in either cache form, with free or with fixed widths, and a hook before each run.
#pragma once

#include <functional>

#include "ort_session.hpp"

namespace mirror {

using Hook = std::function<void(const std::string& segment, const PassFeeds& feeds)>;

// What a graph names where no logit is a number.
class NoIds final : public SentIds {
 public:
  const std::int64_t* wait() override { return &none_; }

 private:
  std::int64_t none_ = -1;
};

class HookedPass final : public BoundPass {
 public:
  HookedPass(std::string name, std::unique_ptr<BoundPass> inner, const PassFeeds& feeds, Hook hook, bool sends_none)
      : name_(std::move(name)),
        inner_(std::move(inner)),
        feeds_(feeds),
        hook_(std::move(hook)),
        sends_none_(sends_none) {}

  void run(int past_length) override {
    if (hook_) hook_(name_, feeds_);
    inner_->run(past_length);
  }
  std::optional<LaunchedIds> launched_ids() const override { return inner_->launched_ids(); }
  std::shared_ptr<SentIds> send_ids() override { return sends_none_ ? std::make_shared<NoIds>() : inner_->send_ids(); }
  void send() override { inner_->send(); }
  const PassOutputs& outputs() override { return inner_->outputs(); }
  const float* logits(int row) override { return inner_->logits(row); }
  float logit(int row, std::int64_t token) override { return inner_->logit(row, token); }
  const std::byte* hidden() override { return inner_->hidden(); }

 private:
  std::string name_;
  std::unique_ptr<BoundPass> inner_;
  const PassFeeds& feeds_;
  Hook hook_;
  bool sends_none_;
};

class HookedSegment final : public Segment {
 public:
  HookedSegment(std::string name, std::unique_ptr<Segment> inner, Hook hook, bool sends_none)
      : name_(std::move(name)), inner_(std::move(inner)), hook_(std::move(hook)), sends_none_(sends_none) {}

  const std::vector<int>& widths() const override { return inner_->widths(); }
  bool launches() const override { return inner_->launches(); }
  std::unique_ptr<BoundPass> bind(PassFeeds& feeds, int rows, const std::shared_ptr<KVCache>& cache) override {
    return std::make_unique<HookedPass>(name_, inner_->bind(feeds, rows, cache), feeds, hook_, sends_none_);
  }
  std::shared_ptr<KVCache> make_cache() override { return inner_->make_cache(); }

 private:
  std::string name_;
  std::unique_ptr<Segment> inner_;
  Hook hook_;
  bool sends_none_;
};

class HookedDevice final : public Device {
 public:
  explicit HookedDevice(Hook hook = nullptr, Form form = Form::inplace, bool fixed_widths = false)
      : hook_(std::move(hook)), form_(form), fixed_widths_(fixed_widths) {}

  const std::string& name() const override { return name_; }
  Form form() const override { return form_; }
  FreeMemory free_memory() const override { return {"host memory", free_bytes}; }

  std::unique_ptr<Segment> load_segment(const std::filesystem::path& folder, const SegmentFacts& facts, int capacity,
                                        const std::vector<PassShape>& shapes, const std::vector<PassShape>& later,
                                        int threads) override {
    Provider provider;
    provider.name = "CPUExecutionProvider";
    provider.form = form_;
    provider.binds = binds;
    provider.fixed_widths = fixed_widths_;
    provider.compiles = fixed_widths_ && !stream;
    provider.stream = stream;
    provider.sized_total = stream != nullptr;
    const bool compiled = provider.compiles;
    const auto open = [folder, threads, compiled, capacity](const Graph& graph, PassShape shape) {
      Ort::SessionOptions options = session_options(threads);
      if (compiled) {
        options.AddFreeDimensionOverrideByName("width", shape.width);
        options.AddFreeDimensionOverrideByName("rows", shape.rows);
        options.AddFreeDimensionOverrideByName("capacity", capacity);
      }
      return Ort::Session(ort_environment(), (folder / graph.file).c_str(), options);
    };
    auto inner =
        std::make_unique<OrtSegment>(facts, graph_of(facts, form_, name_), provider, capacity, open, shapes, later);
    return std::make_unique<HookedSegment>(facts.name, std::move(inner), hook_, sends_none);
  }
  int recorded_passes() const override { return stream ? stream->recorded.load() : 0; }

  std::optional<std::uint64_t> free_bytes;
  // Whether its sessions bind their buffers, or are given them anew at every pass as plugins are.
  bool binds = true;
  // What its passes are launched on, as a GPU's are: one session then takes all widths, fixed ones too.
  std::shared_ptr<DeviceStream> stream;
  // Whether the ids that its passes send to the host name no token.
  bool sends_none = false;

 private:
  std::string name_ = "cpu";
  Hook hook_;
  Form form_;
  bool fixed_widths_;
};

}  // namespace mirror
