// When a text ends: decided on committed tokens only, one token at a time. Pure.
#pragma once

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include "records.hpp"

namespace mirror {

// Takes committed tokens; returns how many count when a stop string was completed.
using StopText = std::function<std::optional<std::size_t>(const Tokens&)>;

class Stopping {
 public:
  Stopping(Tokens eos, std::int64_t limit, StopText stop_text)
      : eos_(std::move(eos)), left_(limit), stop_text_(std::move(stop_text)) {}

  // How many more tokens may be committed.
  std::int64_t left() const { return left_; }

  // Cuts tokens at the first end; returns why the text ends with them, if it does.
  std::optional<FinishReason> cut(Tokens& tokens) {
    std::optional<FinishReason> reason;
    if (static_cast<std::int64_t>(tokens.size()) >= left_) {
      tokens.resize(static_cast<std::size_t>(left_));
      reason = FinishReason::length;
    }
    const auto is_end = [this](Token token) { return std::count(eos_.begin(), eos_.end(), token) > 0; };
    const auto end = std::find_if(tokens.begin(), tokens.end(), is_end);
    if (end != tokens.end()) {
      tokens.erase(end + 1, tokens.end());
      reason = FinishReason::stop;
    }
    if (const auto stopped = stop_text_ ? stop_text_(tokens) : std::nullopt) {
      tokens.resize(*stopped);
      reason = FinishReason::stop;
    }
    left_ -= static_cast<std::int64_t>(tokens.size());
    return reason;
  }

 private:
  Tokens eos_;
  std::int64_t left_;
  StopText stop_text_;
};

}  // namespace mirror
