// Passes that are launched on a device's stream. What a host gives goes up in one copy and what it reads comes down in
// one, in the stream's order; caches and the exit layer's state stay where they are. A pass that has run a few times is
// recorded, and replayed from then on.

#include <algorithm>
#include <cstring>

#include "error.hpp"
#include "provider.hpp"

namespace mirror {
namespace {

// Passes of one total before one is recorded: they allocate, plan and choose kernels.
constexpr int runs_before_recording = 2;
// Slots by which the total grows in graphs that take branches: they look at every slot below it.
constexpr int total_step = 256;

// Tensors side by side in one block on the device and one in pinned host memory, so that one copy moves them all.
class Block {
 public:
  struct Place {
    const TensorSpec* spec;
    std::vector<std::int64_t> shape;
    std::size_t start, bytes;
  };

  void add(const TensorSpec& spec, std::vector<std::int64_t> shape) {
    const std::size_t bytes = byte_count(shape, spec.dtype);
    places.push_back({&spec, std::move(shape), size_, bytes});
    size_ = (size_ + bytes + alignment - 1) / alignment * alignment;
  }
  void allocate(const PassParts& parts) {
    if (size_ == 0) return;
    device_ = device_bytes(parts.session, parts.provider, size_);
    pinned_ = parts.provider.stream->pinned(size_);
    moved_ = parts.provider.stream->mark();
  }

  std::byte* host(const Place& place) const { return static_cast<std::byte*>(pinned_.get()) + place.start; }
  Ort::Value value(const Place& place, const Provider& provider) const {
    return device_view(provider, device(place), place.shape, place.spec->dtype);
  }

  std::byte* device(const Place& place) const { return static_cast<std::byte*>(device_.get()) + place.start; }
  void upload(DeviceStream& stream) {
    if (size_ == 0) return;
    stream.upload(device_.get(), pinned_.get(), size_);
    moved_->renew();
  }
  void download(DeviceStream& stream) {
    if (size_ == 0) return;
    stream.download(pinned_.get(), device_.get(), size_);
    moved_->renew();
  }
  // Waits until the last copy has been made.
  void wait() const {
    if (size_ > 0) moved_->wait();
  }

  std::vector<Place> places;

 private:
  static constexpr std::size_t alignment = 256;  // as a device's own allocator would align each tensor

  std::size_t size_ = 0;
  std::shared_ptr<void> device_, pinned_;
  std::unique_ptr<Mark> moved_;
};

// The same pass for one total: a number that kernels choose themselves by is bound once and for all.
struct Take {
  Take(Ort::Session& session, std::int32_t given) : total(given), binding(session) {}

  std::int32_t total;
  Ort::IoBinding binding;
  int runs = 0;
  std::unique_ptr<Recording> recording;
};

class Sent final : public SentIds {
 public:
  Sent(DeviceStream& stream, std::size_t bytes) : memory_(stream.pinned(bytes)), mark_(stream.mark()), bytes_(bytes) {}

  void start(DeviceStream& stream, const void* from) {
    stream.download(memory_.get(), from, bytes_);
    mark_->renew();
  }
  const std::int64_t* wait() override {
    mark_->wait();
    return place();
  }
  const std::int64_t* place() const override { return static_cast<const std::int64_t*>(memory_.get()); }
  Mark* mark() override { return mark_.get(); }

 private:
  std::shared_ptr<void> memory_;
  std::unique_ptr<Mark> mark_;
  std::size_t bytes_;
};

class StreamPass final : public BoundPass {
 public:
  explicit StreamPass(const PassParts& parts)
      : name_(parts.facts.name),
        provider_(parts.provider),
        session_(parts.session),
        cache_(parts.cache),
        feeds_(parts.feeds),
        sizes_(parts.sizes),
        has_branches_(parts.graph.input("slot_branch") != nullptr) {
    // Whoever reads waits, so the session need not.
    options_.AddConfigEntry("disable_synchronize_execution_providers", "1");
    for (const TensorSpec& spec : parts.graph.inputs) take_input(parts, spec);
    given_.allocate(parts);
    for (const Block::Place& place : given_.places)
      inputs_.emplace_back(place.spec->name, given_.value(place, provider_));
    for (const TensorSpec& spec : parts.graph.outputs) take_output(parts, spec);
    read_.allocate(parts);
    for (const Block::Place& place : read_.places) {
      results_.emplace_back(place.spec->name, read_.value(place, provider_));
      note(outputs_, place.spec->name, read_.host(place), place.shape);
      if (place.spec->name == "token_ids") token_ids_ = &place;
    }
  }

  void run(int past_length) override {
    check_slots(name_, cache_.get(), past_length, sizes_.width);
    if (foreign_) foreign_->wait();
    given_.wait();  // what a pass before this one reads must have left the block
    for (std::size_t at = 0; at < sources_.size(); ++at)
      std::memcpy(given_.host(given_.places[at]), sources_[at], given_.places[at].bytes);
    given_.upload(stream());
    follow();
    launch(take(total(past_length)));
    sent_ = false;
    if (hidden_) hidden_->send();
  }

  std::optional<LaunchedIds> launched_ids() const override {
    if (token_ids_ == nullptr) return std::nullopt;
    return LaunchedIds{provider_.stream.get(), read_.device(*token_ids_)};
  }

  std::shared_ptr<SentIds> send_ids() override {
    // One that nobody waits for any more, or a new one.
    auto free = std::find_if(places_.begin(), places_.end(), [](const auto& place) { return place.use_count() == 1; });
    if (free == places_.end()) free = places_.insert(free, std::make_shared<Sent>(stream(), token_ids_->bytes));
    (*free)->start(stream(), read_.device(*token_ids_));
    return *free;
  }

  void send() override {
    if (!sent_) read_.download(stream());
    sent_ = true;
  }

  const PassOutputs& outputs() override {
    send();
    read_.wait();
    return outputs_;
  }

  // Each row has its own place, so that one doesn't write over another.
  const float* logits(int row) override {
    if (!rows_on_host_) rows_on_host_ = stream().pinned(byte_count(logits_.shape, logits_.dtype));
    const auto vocab_size = logits_.shape.back();
    return fetch(static_cast<float*>(rows_on_host_.get()) + row * vocab_size, row * vocab_size, vocab_size);
  }
  float logit(int row, std::int64_t token) override {
    if (!one_on_host_) one_on_host_ = stream().pinned(sizeof(float));
    return *fetch(static_cast<float*>(one_on_host_.get()), row * logits_.shape.back() + token, 1);
  }

  const std::byte* hidden() override {
    if (!hidden_) return nullptr;
    hidden_->wait();
    return hidden_->host();
  }

 private:
  DeviceStream& stream() const { return *provider_.stream; }

  const float* fetch(float* to, std::int64_t first, std::int64_t count) {
    stream().download(to, static_cast<const float*>(logits_.owner.get()) + first,
                      static_cast<std::size_t>(count) * sizeof(float));
    stream().wait();
    return to;
  }

  // Puts ids that earlier passes give over those of the block.
  void follow() {
    const std::vector<FollowOn> parts = std::exchange(feeds_.follow, {});
    const auto ids = std::find_if(given_.places.begin(), given_.places.end(),
                                  [](const Block::Place& place) { return place.spec->name == "input_ids"; });
    if (ids == given_.places.end()) return;
    const auto bytes = [](int numbers) { return static_cast<std::size_t>(numbers) * sizeof(std::int64_t); };
    for (const FollowOn& from : parts) {
      std::byte* const to = given_.device(*ids) + bytes(from.place);
      if (from.sent) {
        stream().after(*from.sent->mark());
        stream().upload(to, from.sent->place() + from.first, bytes(from.count));
      } else {
        stream().spread(to, bytes(from.stride), static_cast<const std::byte*>(from.given.address) + bytes(from.first),
                        bytes(from.count), static_cast<std::size_t>(from.groups));
      }
    }
  }

  std::int32_t total(int past_length) const {
    if (!has_branches_) return sizes_.capacity;
    const int needed = past_length + sizes_.width;
    return std::min((needed + total_step - 1) / total_step * total_step, sizes_.capacity);
  }

  Take& take(std::int32_t number) {
    auto& found = takes_[number];
    if (found) return *found;
    found = std::make_unique<Take>(*session_, number);
    for (const auto& [name, value] : inputs_) found->binding.BindInput(name.c_str(), value);
    for (const auto& [name, value] : results_) found->binding.BindOutput(name.c_str(), value);
    if (sized_) found->binding.BindInput(total_name, host_view(&found->total, {}, DType::int32));
    return *found;
  }

  // Starts the pass, recording it if the time for that has come.
  void launch(Take& taken) {
    if (!taken.recording && ++taken.runs == runs_before_recording + 1)
      taken.recording = stream().record([this, &taken] { session_->Run(options_, taken.binding); });
    if (taken.recording) {
      taken.recording->replay();
      return;
    }
    try {
      session_->Run(options_, taken.binding);
    } catch (const Ort::Exception& error) {
      throw Error(ErrorKind::device, name_ + " failed on " + provider_.name + ": " + error.what());
    }
  }

  void take_input(const PassParts& parts, const TensorSpec& spec) {
    auto shape = concrete(spec, sizes_);
    if (begins(spec.name, past_prefix)) {
      inputs_.emplace_back(spec.name, over(parts.past(spec.name)));
    } else if (spec.name == "hidden_states") {
      const auto found = parts.hidden(spec);
      if (found->stream == provider_.stream) {
        shared_ = found;
        inputs_.emplace_back(spec.name, over(found->buffer));
      } else {
        foreign_ = found;
        stage(spec, std::move(shape), found->host());
      }
    } else if (spec.name == total_name && provider_.sized_total) {
      sized_ = true;
    } else {
      if (spec.name == "features") feeds_.features.resize(byte_count(shape, spec.dtype));
      stage(spec, std::move(shape), input_data(feeds_, spec.name));
    }
  }

  void stage(const TensorSpec& spec, std::vector<std::int64_t> shape, const void* source) {
    given_.add(spec, std::move(shape));
    sources_.push_back(source);
  }

  void take_output(const PassParts& parts, const TensorSpec& spec) {
    auto shape = concrete(spec, sizes_);
    if (begins(spec.name, present_prefix)) {
      results_.emplace_back(spec.name, over(parts.past(past_name(spec.name))));
    } else if (spec.name == "hidden_states") {
      hidden_ = std::make_shared<Hidden>();
      hidden_->buffer = make_buffer(session_, provider_, shape, spec.dtype);
      hidden_->stream = provider_.stream;
      if (feeds_.hidden_on_host) {
        hidden_->copy = stream().pinned(byte_count(shape, spec.dtype));
        hidden_->copied = stream().mark();
      }
      feeds_.hidden_states = hidden_;
      results_.emplace_back(spec.name, over(hidden_->buffer));
    } else if (spec.name == "logits") {
      logits_ = make_buffer(session_, provider_, shape, spec.dtype);
      results_.emplace_back(spec.name, over(logits_));
    } else {
      read_.add(spec, std::move(shape));
    }
  }

  Ort::Value over(const Buffer& buffer) const {
    return device_view(provider_, buffer.owner.get(), buffer.shape, buffer.dtype);
  }

  static constexpr const char* total_name = "total_sequence_length";

  std::string name_;
  const Provider provider_;
  SharedSession session_;
  std::shared_ptr<OrtCache> cache_;
  PassFeeds& feeds_;
  Sizes sizes_;
  bool has_branches_, sized_ = false, sent_ = true;
  Ort::RunOptions options_;
  Block given_, read_;
  const Block::Place* token_ids_ = nullptr;
  std::vector<std::shared_ptr<Sent>> places_;
  std::vector<const void*> sources_;
  std::shared_ptr<Hidden> hidden_, shared_, foreign_;  // written; read as they are; read from the host
  Buffer logits_;
  std::shared_ptr<void> rows_on_host_, one_on_host_;
  PassOutputs outputs_;
  std::vector<std::pair<std::string, Ort::Value>> inputs_, results_;
  std::map<std::int32_t, std::unique_ptr<Take>> takes_;  // by total
};

}  // namespace

std::unique_ptr<BoundPass> bind_stream_pass(const PassParts& parts) { return std::make_unique<StreamPass>(parts); }

}  // namespace mirror
