// A loaded bundle, and the answers that it makes, one at a time.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "chat.hpp"
#include "generation.hpp"
#include "plan.hpp"
#include "statistics.hpp"
#include "text_stream.hpp"
#include "tokenizer.hpp"

namespace mirror {

// Choices for one answer.
struct GenerationOptions {
  std::int64_t max_new_tokens = 128;
  SamplingParams sampling;
  std::vector<std::string> stop;            // strings that end the text and are left out of it
  std::optional<Mode> mode;                 // else the engine's
  std::optional<int> num_assistant_tokens;  // the most draft tokens of a round; else gamma
  bool reuse_cache = false;                 // keep what the prompt has in common with the last context
  bool wants_text = false;

  void check() const;
};

class Answer;

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  // Loads a bundle. Throws Error(bundle), (device), (request).
  static std::shared_ptr<Engine> load(const std::filesystem::path& folder, const EngineOptions& options);

  Engine(const std::filesystem::path& folder, Manifest manifest, const EngineOptions& options, const Placement& places);

  // Begins an answer. Throws Error(request), (capacity), or (busy) while another one is being made.
  std::unique_ptr<Answer> answer(const Tokens& prompt, const GenerationOptions& options);

  // Stops the answer being made, from any thread, after its current round; no-op when idle.
  void cancel() { cancelled_ = true; }

  // Passes of its devices that were recorded and are replayed, so far.
  int recorded_passes() const;

  // What its devices do without though it was asked for or is usual, a line each.
  std::string notices() const;

  // What our own kernels run the draft with, amx, avx512 or avx2; null where ONNX Runtime runs it, or none is loaded.
  const char* draft_kernels() const { return places_.draft->draft_kernels(); }

  // Messages as prompt text. Throws Error(request) for what the bundle's chat format doesn't cover.
  std::string render_chat(const std::vector<Message>& messages) const {
    return mirror::render_chat(manifest.chat, messages, local_day());
  }

  // Read when first asked for. Throws Error(request) if the bundle has no tokenizer, Error(bundle) if
  // this host can't read the one it has.
  const Tokenizer& tokenizer();

  const Manifest manifest;
  const Plan plan;

 private:
  friend class Answer;

  void check_prompt(const Tokens& prompt) const;

  std::filesystem::path folder_;
  Placement places_;
  std::unique_ptr<Target> target_;
  std::unique_ptr<DraftSeat> seat_;
  Sequence sequence_;
  std::atomic<bool> busy_{false}, cancelled_{false};
  std::mutex tokenizer_mutex_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

// One answer being made. Keeps its engine alive and busy until it has ended or is destroyed.
class Answer {
 public:
  Answer(std::shared_ptr<Engine> engine, const Tokens& prompt, const GenerationOptions& options);
  ~Answer();
  Answer(const Answer&) = delete;
  Answer& operator=(const Answer&) = delete;

  struct Piece {
    Tokens tokens;
    std::string text;  // what they settle; empty without text
  };
  // The next commit; nothing when the answer is complete. The last piece may hold text alone.
  // Throws Error(device) if the target failed; the answer has ended then.
  std::optional<Piece> next();

  // Ends the answer where it stands.
  void finish();

  bool ended() const { return ended_; }
  const Tokens& tokens() const { return tokens_; }
  // The text so far; nothing for an answer without text.
  std::optional<std::string> text() const;
  FinishReason finish_reason() const { return generation_->finish_reason.value_or(FinishReason::cancelled); }
  Statistics statistics() const;
  const std::vector<Round>& rounds() const { return generation_->rounds; }
  const std::vector<Event>& events() const { return generation_->events; }

 private:
  std::optional<std::size_t> watch(const Tokens& tokens);
  std::optional<Piece> last_piece();

  std::shared_ptr<Engine> engine_;
  Clock::time_point start_;
  std::unique_ptr<TextStream> text_;
  std::unique_ptr<Generation> generation_;
  PromptFacts facts_;
  Tokens tokens_;
  std::string settled_;
  bool ended_ = false;
};

}  // namespace mirror
