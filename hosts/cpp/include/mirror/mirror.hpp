// mirror.h for C++17: the same calls with RAII, exceptions and ranges. Header only.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mirror/mirror.h"

namespace mirror {

using Tokens = std::vector<std::int64_t>;

// What a call refused or failed at, with the library's own sentence.
class Exception : public std::runtime_error {
 public:
  Exception(mirror_code code, const std::string& message) : std::runtime_error(message), code_(code) {}
  mirror_code code() const noexcept { return code_; }

 private:
  mirror_code code_;
};

// Frees a status; throws it if it is one.
inline void check(mirror_status* status) {
  if (status == nullptr) return;
  const Exception error(mirror_status_code(status), mirror_status_message(status));
  mirror_status_free(status);
  throw error;
}

// mirror_load_options, filled with what the library takes where nothing is said.
struct LoadOptions : mirror_load_options {
  LoadOptions() { mirror_load_options_init(this); }
};

// mirror_generate_options; `stop_strings` are passed on as `stop`.
struct GenerateOptions : mirror_generate_options {
  GenerateOptions() { mirror_generate_options_init(this); }
  std::vector<std::string> stop_strings;
};

// One message of a conversation; `role` is system, user or assistant.
struct Message {
  std::string role, content;
};
using Messages = std::vector<Message>;

// What one round committed.
struct Piece {
  Tokens tokens;
  std::string text;
};

// One answer: iterate for its pieces, or `run` it. Move-only; dropping it ends it.
class Answer {
 public:
  explicit Answer(mirror_answer* answer) : answer_(answer) {}

  // Runs one round; false when the answer is complete.
  bool next(Piece& piece) {
    mirror_piece found{};
    std::int32_t more = 0;
    check(mirror_answer_next(answer_.get(), &found, &more));
    if (more == 0) return false;
    piece.tokens.assign(found.tokens, found.tokens + found.token_count);
    piece.text.assign(found.text, found.text_length);
    return true;
  }

  // Runs to the end.
  Answer& run() {
    check(mirror_answer_run(answer_.get(), nullptr, nullptr));
    return *this;
  }

  Tokens tokens() const {
    std::size_t count = 0;
    const std::int64_t* found = mirror_answer_tokens(answer_.get(), &count);
    return count == 0 ? Tokens{} : Tokens(found, found + count);
  }

  // Empty for an answer without text.
  std::string text() const {
    std::size_t length = 0;
    const char* found = mirror_answer_text(answer_.get(), &length);
    return found == nullptr ? std::string() : std::string(found, length);
  }

  mirror_finish_reason finish_reason() const { return mirror_answer_finish_reason(answer_.get()); }

  mirror_statistics statistics() const {
    mirror_statistics found{};
    found.struct_size = sizeof found;
    check(mirror_answer_statistics(answer_.get(), &found));
    return found;
  }

  std::vector<std::string> events() const {
    std::vector<std::string> messages;
    for (std::size_t index = 0; index < mirror_answer_event_count(answer_.get()); ++index)
      messages.emplace_back(mirror_answer_event(answer_.get(), index));
    return messages;
  }

  class iterator {
   public:
    using value_type = Piece;
    using difference_type = std::ptrdiff_t;
    using pointer = const Piece*;
    using reference = const Piece&;
    using iterator_category = std::input_iterator_tag;

    iterator() = default;
    explicit iterator(Answer* answer) : answer_(answer) { ++*this; }
    const Piece& operator*() const { return piece_; }
    const Piece* operator->() const { return &piece_; }
    iterator& operator++() {
      if (!answer_->next(piece_)) answer_ = nullptr;
      return *this;
    }
    void operator++(int) { ++*this; }
    bool operator==(const iterator& other) const { return answer_ == other.answer_; }
    bool operator!=(const iterator& other) const { return answer_ != other.answer_; }

   private:
    Answer* answer_ = nullptr;
    Piece piece_;
  };

  iterator begin() { return iterator(this); }
  iterator end() { return {}; }

 private:
  struct Free {
    void operator()(mirror_answer* answer) const { mirror_answer_free(answer); }
  };
  std::unique_ptr<mirror_answer, Free> answer_;
};

// A loaded bundle. Move-only.
class Engine {
 public:
  explicit Engine(const std::string& folder, const LoadOptions& options = {}) {
    mirror_engine* made = nullptr;
    check(mirror_engine_load(folder.c_str(), &options, &made));
    engine_.reset(made);
  }

  // Begins an answer to a conversation, to a UTF-8 text, or to token ids.
  Answer answer(const Messages& messages, const GenerateOptions& options = {}) {
    const Prepared given(options);
    const auto list = listed(messages);
    mirror_answer* made = nullptr;
    check(mirror_answer_start_chat(engine_.get(), list.data(), list.size(), &given.options, &made));
    return Answer(made);
  }
  Answer answer(std::string_view text, const GenerateOptions& options = {}) {
    const Prepared given(options);
    mirror_answer* made = nullptr;
    check(mirror_answer_start_text(engine_.get(), text.data(), text.size(), &given.options, &made));
    return Answer(made);
  }
  Answer answer(const Tokens& tokens, const GenerateOptions& options = {}) {
    const Prepared given(options);
    mirror_answer* made = nullptr;
    check(mirror_answer_start_tokens(engine_.get(), tokens.data(), tokens.size(), &given.options, &made));
    return Answer(made);
  }

  mirror_engine_facts facts() const {
    mirror_engine_facts found{};
    found.struct_size = sizeof found;
    check(mirror_engine_describe(engine_.get(), &found));
    return found;
  }

  // Stops the answer being made, from any thread.
  void cancel() noexcept { mirror_engine_cancel(engine_.get()); }

  // A conversation in the model's chat format, special tokens included.
  std::string render_chat(const Messages& messages) {
    const auto list = listed(messages);
    char* found = nullptr;
    std::size_t length = 0;
    check(mirror_engine_render_chat(engine_.get(), list.data(), list.size(), &found, &length));
    const std::unique_ptr<char, void (*)(char*)> owner(found, mirror_text_free);
    return std::string(found, length);
  }

  Tokens encode(std::string_view text, bool add_special_tokens = true) {
    std::int64_t* found = nullptr;
    std::size_t count = 0;
    check(mirror_engine_encode(engine_.get(), text.data(), text.size(), add_special_tokens, &found, &count));
    const std::unique_ptr<std::int64_t, void (*)(std::int64_t*)> owner(found, mirror_tokens_free);
    return Tokens(found, found + count);
  }

  std::string decode(const Tokens& tokens) {
    char* found = nullptr;
    std::size_t length = 0;
    check(mirror_engine_decode(engine_.get(), tokens.data(), tokens.size(), &found, &length));
    const std::unique_ptr<char, void (*)(char*)> owner(found, mirror_text_free);
    return std::string(found, length);
  }

 private:
  // In C's form, as long as `messages` live.
  static std::vector<mirror_message> listed(const Messages& messages) {
    std::vector<mirror_message> list;
    for (const Message& message : messages)
      list.push_back({message.role.c_str(), message.content.data(), message.content.size()});
    return list;
  }

  // Options whose stop strings are in C's form, as long as a call lasts.
  struct Prepared {
    explicit Prepared(const GenerateOptions& given) : options(given) {
      for (const std::string& text : given.stop_strings) stops.push_back(text.c_str());
      if (stops.empty()) return;
      options.stop = stops.data();
      options.stop_count = stops.size();
    }
    mirror_generate_options options;
    std::vector<const char*> stops;
  };

  struct Free {
    void operator()(mirror_engine* engine) const { mirror_engine_free(engine); }
  };
  std::unique_ptr<mirror_engine, Free> engine_;
};

}  // namespace mirror
