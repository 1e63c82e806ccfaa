#include "engine.hpp"

#include <algorithm>
#include <set>

#include "error.hpp"

namespace mirror {
namespace {

bool shares_cpu(const Placement& places) {
  return (places.target->on_cpu() || places.suffix->on_cpu()) && places.draft->on_cpu();
}

}  // namespace

void GenerationOptions::check() const {
  if (max_new_tokens < 1)
    throw Error(ErrorKind::request, "max_new_tokens is " + std::to_string(max_new_tokens) + "; it must be 1 or more");
  if (num_assistant_tokens && *num_assistant_tokens < 1)
    throw Error(ErrorKind::request, "num_assistant_tokens is " + std::to_string(*num_assistant_tokens) +
                                        "; it must be 1 or more (mode plain drafts nothing)");
  sampling.check();
}

std::shared_ptr<Engine> Engine::load(const std::filesystem::path& folder, const EngineOptions& options) {
  Manifest manifest = read_manifest(folder);
  check_files(folder, manifest, options.verify_hashes);
  const Placement places = open_devices(manifest, options);
  check_room(memory_needs(folder, manifest, make_plan(manifest, options, shares_cpu(places)), places));
  return std::make_shared<Engine>(folder, std::move(manifest), options, places);
}

Engine::Engine(const std::filesystem::path& folder, Manifest read, const EngineOptions& options,
               const Placement& places)
    : manifest(std::move(read)),
      plan(make_plan(manifest, options, shares_cpu(places))),
      folder_(folder),
      places_(places),
      target_(load_target(folder, manifest, plan, places)),
      sequence_(plan.max_length) {
  if (plan.mode != Mode::plain)
    seat_ = std::make_unique<DraftSeat>(load_draft(folder, manifest, plan, *places.draft), plan.draft_timeout_s);
}

std::unique_ptr<Answer> Engine::answer(const Tokens& prompt, const GenerationOptions& options) {
  options.check();
  check_prompt(prompt);
  return std::make_unique<Answer>(shared_from_this(), prompt, options);
}

const Tokenizer& Engine::tokenizer() {
  const std::lock_guard<std::mutex> lock(tokenizer_mutex_);
  if (!tokenizer_) tokenizer_ = std::make_unique<Tokenizer>(folder_);
  return *tokenizer_;
}

std::string Engine::notices() const {
  std::string lines;
  for (const Device* device : {places_.target.get(), places_.suffix.get(), places_.draft.get()})
    for (const std::string& notice : device->notices())
      if (lines.find(notice) == std::string::npos) lines += (lines.empty() ? "" : "\n") + notice;
  return lines;
}

int Engine::recorded_passes() const {
  int total = 0;
  for (const Device* device : std::set<const Device*>{places_.target.get(), places_.suffix.get(), places_.draft.get()})
    total += device->recorded_passes();
  return total;
}

void Engine::check_prompt(const Tokens& prompt) const {
  if (prompt.empty()) throw Error(ErrorKind::request, "the prompt has no tokens; give at least one");
  const auto [least, most] = std::minmax_element(prompt.begin(), prompt.end());
  const int vocab_size = manifest.model.vocab_size;
  if (*least >= 0 && *most < vocab_size) return;
  throw Error(ErrorKind::request, "the prompt holds token " + std::to_string(*most >= vocab_size ? *most : *least) +
                                      "; this model's tokens are 0 to " + std::to_string(vocab_size - 1));
}

Answer::Answer(std::shared_ptr<Engine> engine, const Tokens& prompt, const GenerationOptions& options)
    : engine_(std::move(engine)), start_(Clock::now()) {
  Engine& host = *engine_;
  const Mode asked = options.mode.value_or(host.plan.mode);
  if (asked != Mode::plain && !host.seat_)
    throw Error(ErrorKind::request,
                "mode " + to_string(asked) +
                    " needs the draft, and the bundle was loaded in mode plain, without it; load it in "
                    "mode serial or mirror");
  if (options.wants_text || !options.stop.empty()) text_ = std::make_unique<TextStream>(host.tokenizer(), options.stop);
  Sampler sampler(options.sampling, host.manifest.model.vocab_size, prompt);
  Stopping stopping(host.manifest.tokens.eos, options.max_new_tokens,
                    text_ ? StopText([this](const Tokens& tokens) { return watch(tokens); }) : StopText());
  if (host.busy_.exchange(true))
    throw Error(ErrorKind::busy,
                "this engine is already making an answer; wait for it, cancel it, or load a second engine");
  try {
    host.cancelled_ = false;
    facts_.tokens = static_cast<int>(prompt.size());
    facts_.reused_tokens = host.sequence_.begin(prompt, options.reuse_cache);
    const bool lost = host.seat_ && host.seat_->lost();
    std::optional<CoupledNoise> noise;
    if (options.sampling.temperature > 0) noise = CoupledNoise{options.sampling.seed, options.sampling.temperature};
    generation_ = std::make_unique<Generation>(*host.target_, lost ? nullptr : host.seat_.get(), host.sequence_,
                                               std::move(sampler), std::move(stopping), lost ? Mode::plain : asked,
                                               round_shape(host.manifest, host.plan, options.num_assistant_tokens),
                                               noise, [&host] { return host.cancelled_.load(); });
    if (lost && asked != Mode::plain) generation_->events.push_back({"draft_lost", *host.seat_->lost()});
  } catch (...) {
    host.busy_ = false;
    throw;
  }
}

Answer::~Answer() { finish(); }

std::optional<Answer::Piece> Answer::next() {
  if (ended_) return std::nullopt;
  const bool first = !facts_.ttft_s;
  try {
    Piece piece{generation_->next(), {}};
    if (piece.tokens.empty()) {
      finish();
      return last_piece();
    }
    if (first) {
      facts_.ttft_s = seconds_between(start_, Clock::now());
      facts_.first_tokens = static_cast<int>(piece.tokens.size());
    }
    tokens_.insert(tokens_.end(), piece.tokens.begin(), piece.tokens.end());
    if (generation_->finish_reason) finish();
    piece.text = std::exchange(settled_, {});
    return piece;
  } catch (...) {
    finish();
    throw;
  }
}

// What was held back until the end, if anything.
std::optional<Answer::Piece> Answer::last_piece() {
  if (settled_.empty()) return std::nullopt;
  return Piece{{}, std::exchange(settled_, {})};
}

void Answer::finish() {
  if (ended_) return;
  ended_ = true;
  generation_->settle();
  if (text_) settled_ += text_->finish();
  engine_->busy_ = false;
}

std::optional<std::string> Answer::text() const {
  if (!text_) return std::nullopt;
  return text_->text();
}

Statistics Answer::statistics() const {
  PromptFacts facts = facts_;
  facts.passes = generation_->prefill_passes;
  return summarise(facts, generation_->rounds);
}

// Takes committed tokens; returns how many count if they complete a stop string.
std::optional<std::size_t> Answer::watch(const Tokens& tokens) {
  const std::size_t before = text_->kept_tokens();
  settled_ += text_->push(tokens);
  if (!text_->stopped()) return std::nullopt;
  return text_->kept_tokens() - before;
}

}  // namespace mirror
