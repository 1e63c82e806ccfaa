#include <cstring>

#include "error.hpp"
#include "provider.hpp"

namespace mirror {
namespace {

// What a session is given and asked for by name, where nothing is bound.
class Exchange {
 public:
  void give(const std::string& name, Ort::Value value) {
    given_.push_back(name);
    values_.push_back(std::move(value));
  }
  // `buffer` must stay where it is.
  void ask(const std::string& name, const Buffer& buffer) {
    asked_.push_back(name);
    places_.emplace_back(buffer.host, byte_count(buffer.shape, buffer.dtype));
  }
  void run(Ort::Session& session) const {
    const auto given = pointers(given_), asked = pointers(asked_);
    const auto results =
        session.Run(Ort::RunOptions{}, given.data(), values_.data(), given.size(), asked.data(), asked.size());
    for (std::size_t at = 0; at < results.size(); ++at)
      std::memcpy(places_[at].first, results[at].GetTensorRawData(), places_[at].second);
  }

 private:
  static std::vector<const char*> pointers(const std::vector<std::string>& names) {
    std::vector<const char*> result;
    for (const std::string& name : names) result.push_back(name.c_str());
    return result;
  }

  std::vector<std::string> given_, asked_;
  std::vector<Ort::Value> values_;
  std::vector<std::pair<std::byte*, std::size_t>> places_;
};

// One pass of one size in host memory; it has ended when it returns.
class HostPass final : public BoundPass {
 public:
  explicit HostPass(const PassParts& parts)
      : name_(parts.facts.name),
        provider_(parts.provider),
        session_(parts.session),
        cache_(parts.cache),
        width_(parts.sizes.width),
        binding_(*session_) {
    kept_.reserve(parts.graph.outputs.size());  // places in it are kept
    for (const TensorSpec& spec : parts.graph.inputs) bind_input(parts, spec);
    for (const TensorSpec& spec : parts.graph.outputs) bind_output(parts, spec);
  }

  void run(int past_length) override {
    check_slots(name_, cache_.get(), past_length, width_);
    if (hidden_) hidden_->wait();
    try {
      if (provider_.binds)
        session_->Run(options_, binding_);
      else
        exchange_.run(*session_);
    } catch (const Ort::Exception& error) {
      throw Error(ErrorKind::device, name_ + " failed on " + provider_.name + ": " + error.what());
    }
    for (const auto& [past, rows] : new_rows_) write_rows(*past, *rows, past_length);
  }

  const PassOutputs& outputs() override { return outputs_; }
  const float* logits(int row) override { return logits_ + static_cast<std::ptrdiff_t>(row) * vocab_size_; }
  float logit(int row, std::int64_t token) override { return logits(row)[token]; }
  const std::byte* hidden() override { return hidden_ ? hidden_->host() : nullptr; }

 private:
  void bind_input(const PassParts& parts, const TensorSpec& spec) {
    const auto shape = concrete(spec, parts.sizes);
    std::byte* data = nullptr;
    if (begins(spec.name, past_prefix)) {
      data = parts.past(spec.name).host;
    } else if (spec.name == "hidden_states") {
      hidden_ = parts.hidden(spec);
      data = hidden_->host();
    } else {
      if (spec.name == "features") parts.feeds.features.resize(byte_count(shape, spec.dtype));
      data = static_cast<std::byte*>(input_data(parts.feeds, spec.name));
    }
    Ort::Value value = host_view(data, shape, spec.dtype);
    if (provider_.binds)
      binding_.BindInput(spec.name.c_str(), value);
    else
      exchange_.give(spec.name, std::move(value));
  }

  void bind_output(const PassParts& parts, const TensorSpec& spec) {
    if (begins(spec.name, present_prefix)) {
      bind_present(parts, spec);
      return;
    }
    const auto shape = concrete(spec, parts.sizes);
    if (spec.name == "hidden_states") {
      hidden_ = std::make_shared<Hidden>();
      hidden_->buffer = host_buffer(shape, spec.dtype);
      parts.feeds.hidden_states = hidden_;
      ask(spec.name, hidden_->buffer);
      return;
    }
    kept_.push_back(host_buffer(shape, spec.dtype));
    ask(spec.name, kept_.back());
    note_output(spec.name, kept_.back());
  }

  void bind_present(const PassParts& parts, const TensorSpec& spec) {
    Buffer& buffer = parts.past(past_name(spec.name));
    if (provider_.form == Form::inplace) {
      ask(spec.name, buffer);
      return;
    }
    kept_.push_back(host_buffer(concrete(spec, parts.sizes), spec.dtype));
    ask(spec.name, kept_.back());
    new_rows_.emplace_back(&buffer, &kept_.back());
  }

  void ask(const std::string& name, const Buffer& buffer) {
    if (provider_.binds)
      binding_.BindOutput(name.c_str(), buffer.value);
    else
      exchange_.ask(name, buffer);
  }

  void note_output(const std::string& name, const Buffer& buffer) {
    if (name == "logits") {
      logits_ = reinterpret_cast<const float*>(buffer.host);
      vocab_size_ = buffer.shape.back();
    } else {
      note(outputs_, name, buffer.host, buffer.shape);
    }
  }

  // Copies rows [1, heads, width, head_dim] to slots past_length.. of [1, heads, capacity, head_dim].
  static void write_rows(Buffer& past, const Buffer& rows, int past_length) {
    const auto heads = static_cast<std::size_t>(rows.shape[1]);
    const std::size_t row_bytes = static_cast<std::size_t>(rows.shape[3]) * size_of(rows.dtype);
    const std::size_t count = static_cast<std::size_t>(rows.shape[2]),
                      capacity = static_cast<std::size_t>(past.shape[2]);
    for (std::size_t head = 0; head < heads; ++head)
      std::memcpy(past.host + (head * capacity + static_cast<std::size_t>(past_length)) * row_bytes,
                  rows.host + head * count * row_bytes, count * row_bytes);
  }

  std::string name_;
  const Provider provider_;
  SharedSession session_;
  std::shared_ptr<OrtCache> cache_;
  std::shared_ptr<Hidden> hidden_;
  int width_;
  Ort::IoBinding binding_;
  Ort::RunOptions options_;
  Exchange exchange_;
  std::vector<Buffer> kept_;
  std::vector<std::pair<Buffer*, const Buffer*>> new_rows_;
  PassOutputs outputs_;
  const float* logits_ = nullptr;
  std::int64_t vocab_size_ = 0;
};

}  // namespace

std::unique_ptr<BoundPass> bind_host_pass(const PassParts& parts) { return std::make_unique<HostPass>(parts); }

}  // namespace mirror
