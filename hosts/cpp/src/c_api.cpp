// mirror.h over the engine: nothing but conversion, and no exception crosses it.

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>

#include "engine.hpp"
#include "error.hpp"
#include "mirror/mirror.h"
#include "kernels/noise.hpp"

// The function itself is for programs that were built before it was a macro.
#undef mirror_load_options_init

struct mirror_status {
  mirror_code code;
  std::string message;
};

struct mirror_engine {
  std::shared_ptr<mirror::Engine> engine;
  std::string notices;
};

struct mirror_answer {
  std::unique_ptr<mirror::Answer> answer;
  mirror::Answer::Piece piece;
  std::string text;
};

namespace {

using mirror::Error;
using mirror::ErrorKind;

mirror_code code_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::bundle: return MIRROR_BUNDLE;
    case ErrorKind::capacity: return MIRROR_CAPACITY;
    case ErrorKind::request: return MIRROR_REQUEST;
    case ErrorKind::busy: return MIRROR_BUSY;
    default: return MIRROR_DEVICE;
  }
}

// Told when there is no memory for a status of its own; never freed.
mirror_status exhausted{MIRROR_INTERNAL, "out of memory"};

mirror_status* failure(mirror_code code, const char* message) noexcept {
  try {
    return new mirror_status{code, message};
  } catch (...) {
    return &exhausted;
  }
}

// Runs `work`; turns what it throws into a status.
template <typename Work>
mirror_status* guarded(Work work) noexcept {
  try {
    work();
    return nullptr;
  } catch (const Error& error) {
    return failure(code_of(error.kind()), error.what());
  } catch (const std::exception& error) {
    return failure(MIRROR_INTERNAL, error.what());
  } catch (...) {
    return failure(MIRROR_INTERNAL, "an unknown exception");
  }
}

void require(bool holds, const char* message) {
  if (!holds) throw Error(ErrorKind::request, message);
}

// The caller's struct in this library's layout: what an older program doesn't know keeps its default.
template <typename Options, typename Init>
Options full(const Options* given, Init init) {
  Options options;
  init(&options);
  if (given == nullptr) return options;
  require(given->struct_size >= sizeof(std::uint32_t),
          "struct_size is not set; fill the options with their *_init function");
  std::memcpy(&options, given, std::min<std::size_t>(given->struct_size, sizeof(Options)));
  options.struct_size = sizeof(Options);
  return options;
}

// Writes a result as far as the caller's struct goes.
template <typename Result>
void write(Result* to, Result from) {
  require(to != nullptr && to->struct_size >= sizeof(std::uint32_t),
          "struct_size is not set; set it to the struct's size");
  const auto size = std::min<std::size_t>(to->struct_size, sizeof(Result));
  from.struct_size = static_cast<std::uint32_t>(size);
  std::memcpy(static_cast<void*>(to), &from, size);
}

// The members that version 1.2 had.
constexpr std::size_t load_options_1_2 = offsetof(mirror_load_options, branches_per_pass);
static_assert(load_options_1_2 % alignof(mirror_load_options) == 0, "a 1.2 program's struct ends where 1.3's goes on");

void init_load_options(mirror_load_options* options) { mirror_load_options_init_sized(options, sizeof *options); }

std::optional<mirror::Mode> mode_of(mirror_mode mode) {
  require(mode >= MIRROR_MODE_UNSET && mode <= MIRROR_MODE_MIRROR, "mode is not one of the MIRROR_MODE_* values");
  if (mode == MIRROR_MODE_UNSET) return std::nullopt;
  return static_cast<mirror::Mode>(mode - 1);
}

std::optional<mirror::CandidateSource> source_of(mirror_candidates source) {
  require(source >= MIRROR_CANDIDATES_UNSET && source <= MIRROR_CANDIDATES_BOTH,
          "candidates is not one of the MIRROR_CANDIDATES_* values");
  if (source == MIRROR_CANDIDATES_UNSET) return std::nullopt;
  return static_cast<mirror::CandidateSource>(source - 1);
}

std::vector<mirror::Message> messages_of(const mirror_message* messages, std::size_t count) {
  require(messages != nullptr || count == 0, "messages is NULL; pass them");
  std::vector<mirror::Message> result;
  for (std::size_t index = 0; index < count; ++index) {
    const mirror_message& from = messages[index];
    require(from.role != nullptr && (from.content != nullptr || from.content_length == 0),
            "a message's role or content is NULL; pass both");
    result.push_back({from.role, std::string(from.content == nullptr ? "" : from.content, from.content_length)});
  }
  return result;
}

std::optional<int> number_of(std::int32_t value) { return value == 0 ? std::nullopt : std::optional<int>(value); }

std::optional<std::string> text_of(const char* text) {
  return text == nullptr ? std::nullopt : std::optional<std::string>(text);
}

std::optional<std::vector<int>> list_of(const std::int32_t* values, std::size_t count) {
  if (values == nullptr || count == 0) return std::nullopt;
  return std::vector<int>(values, values + count);
}

mirror::EngineOptions engine_options(const mirror_load_options& given) {
  mirror::EngineOptions options;
  options.mode = mode_of(given.mode);
  options.candidates = source_of(given.candidates);
  options.threads = number_of(given.threads);
  options.max_length = number_of(given.max_length);
  options.gamma = number_of(given.gamma);
  options.kappa = number_of(given.kappa);
  options.fanout = list_of(given.fanout, given.fanout_count);
  options.tokens_per_pass = list_of(given.tokens_per_pass, given.tokens_per_pass_count);
  options.branches_per_pass = list_of(given.branches_per_pass, given.branches_per_pass_count);
  options.proposal_tokens_per_pass = list_of(given.proposal_tokens_per_pass, given.proposal_tokens_per_pass_count);
  options.draft_context = number_of(given.draft_context);
  options.target_device = text_of(given.target_device);
  options.suffix_device = text_of(given.suffix_device);
  options.draft_device = text_of(given.draft_device);
  options.pinned = given.pinned != 0;
  options.verify_hashes = given.verify_hashes != 0;
  options.draft_timeout_s = given.draft_timeout_s;
  options.max_ngram_size = given.max_ngram_size;
  return options;
}

mirror::SamplingParams sampling_of(const mirror_generate_options& given) {
  return {given.temperature, given.top_k, given.top_p, given.min_p, given.repetition_penalty, given.seed};
}

mirror::GenerationOptions generation_options(const mirror_generate_options& given) {
  mirror::GenerationOptions options;
  options.max_new_tokens = given.max_new_tokens;
  options.sampling = sampling_of(given);
  for (std::size_t index = 0; index < given.stop_count; ++index) {
    require(given.stop != nullptr && given.stop[index] != nullptr, "stop holds a NULL; pass zero-terminated strings");
    options.stop.emplace_back(given.stop[index]);
  }
  options.mode = mode_of(given.mode);
  options.num_assistant_tokens = number_of(given.num_assistant_tokens);
  options.reuse_cache = given.reuse_cache != 0;
  options.wants_text = given.text != 0;
  return options;
}

mirror::Tokens tokens_of(const std::int64_t* tokens, std::size_t count) {
  require(tokens != nullptr || count == 0, "tokens is NULL; pass an array");
  return count == 0 ? mirror::Tokens{} : mirror::Tokens(tokens, tokens + count);
}

std::string string_of(const char* text, std::size_t length) {
  require(text != nullptr || length == 0, "text is NULL; pass UTF-8");
  return length == 0 ? std::string() : std::string(text, length);
}

// A copy that the caller frees with free().
void* copied(const void* data, std::size_t bytes, std::size_t capacity) {
  void* memory = std::calloc(1, std::max<std::size_t>(capacity, 1));
  if (memory == nullptr) throw std::bad_alloc();
  if (bytes > 0) std::memcpy(memory, data, bytes);
  return memory;
}

void start(mirror_engine* engine, const mirror::Tokens& prompt, const mirror::GenerationOptions& options,
           mirror_answer** answer) {
  auto made = std::make_unique<mirror_answer>();
  made->answer = engine->engine->answer(prompt, options);
  *answer = made.release();
}

mirror_mode mode_number(mirror::Mode mode) { return static_cast<mirror_mode>(static_cast<int>(mode) + 1); }

double or_nan(const std::optional<double>& value) { return value.value_or(std::numeric_limits<double>::quiet_NaN()); }

mirror_statistics statistics_of(const mirror::Statistics& from) {
  mirror_statistics to{};
  to.prompt_tokens = from.prompt_tokens;
  to.reused_prompt_tokens = from.reused_prompt_tokens;
  to.generated_tokens = from.generated_tokens;
  to.rounds = from.rounds;
  to.draft_tokens_proposed = from.draft_tokens_proposed;
  to.draft_tokens_accepted = from.draft_tokens_accepted;
  to.target_forward_passes = from.target_forward_passes;
  to.redrafts = from.redrafts;
  to.acceptance_rate = or_nan(from.acceptance_rate);
  to.tokens_per_round = or_nan(from.tokens_per_round);
  to.reuse_rate = or_nan(from.reuse_rate);
  to.branches_per_round = or_nan(from.branches_per_round);
  to.ttft_s = or_nan(from.ttft_s);
  to.decode_tokens_per_s = or_nan(from.decode_tokens_per_s);
  to.draft_hidden = or_nan(from.draft_hidden);
  to.round_ms = from.round_ms;
  to.prefix_ms = from.prefix_ms;
  to.exit_head_ms = from.exit_head_ms;
  to.suffix_ms = from.suffix_ms;
  to.trunk_ms = from.trunk_ms;
  to.rollout_ms = from.rollout_ms;
  to.propose_ms = from.propose_ms;
  to.candidate_wait_ms = from.candidate_wait_ms;
  to.rollout_wait_ms = from.rollout_wait_ms;
  to.redraft_ms = from.redraft_ms;
  to.host_ms = from.host_ms;
  return to;
}

}  // namespace

extern "C" {

uint32_t mirror_api_version(void) { return MIRROR_API_MAJOR * 1000 + MIRROR_API_MINOR; }

mirror_code mirror_status_code(const mirror_status* status) { return status == nullptr ? MIRROR_OK : status->code; }
const char* mirror_status_message(const mirror_status* status) {
  return status == nullptr ? "" : status->message.c_str();
}

void mirror_status_free(mirror_status* status) {
  if (status != &exhausted) delete status;
}

mirror_status* mirror_register_provider_library(const char* name, const char* path) {
  return guarded([&] {
    require(name != nullptr && path != nullptr, "name or path is NULL; pass both");
    mirror::register_provider_library(name, std::filesystem::u8path(path));
  });
}

void mirror_load_options_init_sized(mirror_load_options* options, size_t size) {
  mirror_load_options defaults{};
  defaults.struct_size = static_cast<std::uint32_t>(size);
  defaults.draft_timeout_s = 30.0;
  defaults.max_ngram_size = 3;
  std::memset(static_cast<void*>(options), 0, size);
  std::memcpy(static_cast<void*>(options), &defaults, std::min(size, sizeof defaults));
}

void mirror_load_options_init(mirror_load_options* options) {
  mirror_load_options_init_sized(options, load_options_1_2);
}

mirror_status* mirror_engine_load(const char* folder, const mirror_load_options* options, mirror_engine** engine) {
  return guarded([&] {
    require(folder != nullptr && engine != nullptr, "folder or engine is NULL; pass both");
    const auto chosen = engine_options(full(options, init_load_options));
    auto made = std::make_unique<mirror_engine>();
    made->engine = mirror::Engine::load(std::filesystem::u8path(folder), chosen);
    made->notices = made->engine->notices();
    *engine = made.release();
  });
}

void mirror_engine_free(mirror_engine* engine) {
  if (engine != nullptr) engine->engine->cancel();
  delete engine;
}

void mirror_engine_cancel(mirror_engine* engine) {
  if (engine != nullptr) engine->engine->cancel();
}

mirror_status* mirror_engine_describe(const mirror_engine* engine, mirror_engine_facts* facts) {
  return guarded([&] {
    require(engine != nullptr, "engine is NULL");
    const mirror::Plan& plan = engine->engine->plan;
    write(facts, mirror_engine_facts{0, mode_number(plan.mode), engine->engine->manifest.model.vocab_size, plan.gamma,
                                     plan.max_length, plan.branches(), plan.target_threads, plan.draft_threads,
                                     engine->engine->recorded_passes(), engine->engine->draft_kernels(),
                                     engine->notices.empty() ? nullptr : engine->notices.c_str()});
  });
}

mirror_status* mirror_bundle_check(const char* folder, int32_t verify_hashes) {
  return guarded([&] {
    require(folder != nullptr, "folder is NULL");
    const auto path = std::filesystem::u8path(folder);
    mirror::check_files(path, mirror::read_manifest(path), verify_hashes != 0);
  });
}

mirror_status* mirror_engine_encode(mirror_engine* engine, const char* text, size_t length, int32_t add_special_tokens,
                                    int64_t** tokens, size_t* count) {
  return guarded([&] {
    require(engine != nullptr && tokens != nullptr && count != nullptr, "engine, tokens or count is NULL; pass all");
    const mirror::Tokens ids = engine->engine->tokenizer().encode(string_of(text, length), add_special_tokens != 0);
    const std::size_t bytes = ids.size() * sizeof(std::int64_t);
    *tokens = static_cast<int64_t*>(copied(ids.data(), bytes, bytes));
    *count = ids.size();
  });
}

void mirror_tokens_free(int64_t* tokens) { std::free(tokens); }

mirror_status* mirror_engine_decode(mirror_engine* engine, const int64_t* tokens, size_t count, char** text,
                                    size_t* length) {
  return guarded([&] {
    require(engine != nullptr && text != nullptr && length != nullptr, "engine, text or length is NULL; pass all");
    const std::string decoded = engine->engine->tokenizer().decode(tokens_of(tokens, count));
    *text = static_cast<char*>(copied(decoded.data(), decoded.size(), decoded.size() + 1));
    *length = decoded.size();
  });
}

void mirror_text_free(char* text) { std::free(text); }

void mirror_generate_options_init(mirror_generate_options* options) {
  *options = {};
  options->struct_size = sizeof *options;
  options->max_new_tokens = 128;
  options->top_p = 1.0;
  options->repetition_penalty = 1.0;
  options->add_special_tokens = 1;
}

mirror_status* mirror_answer_start_tokens(mirror_engine* engine, const int64_t* tokens, size_t count,
                                          const mirror_generate_options* options, mirror_answer** answer) {
  return guarded([&] {
    require(engine != nullptr && answer != nullptr, "engine or answer is NULL; pass both");
    start(engine, tokens_of(tokens, count), generation_options(full(options, mirror_generate_options_init)), answer);
  });
}

mirror_status* mirror_answer_start_text(mirror_engine* engine, const char* text, size_t length,
                                        const mirror_generate_options* options, mirror_answer** answer) {
  return guarded([&] {
    require(engine != nullptr && answer != nullptr, "engine or answer is NULL; pass both");
    const mirror_generate_options given = full(options, mirror_generate_options_init);
    mirror::GenerationOptions chosen = generation_options(given);
    chosen.wants_text = true;
    start(engine, engine->engine->tokenizer().encode(string_of(text, length), given.add_special_tokens != 0), chosen,
          answer);
  });
}

mirror_status* mirror_engine_render_chat(mirror_engine* engine, const mirror_message* messages, size_t count,
                                         char** text, size_t* length) {
  return guarded([&] {
    require(engine != nullptr && text != nullptr && length != nullptr, "engine, text or length is NULL; pass all");
    const std::string rendered = engine->engine->render_chat(messages_of(messages, count));
    *text = static_cast<char*>(copied(rendered.data(), rendered.size(), rendered.size() + 1));
    *length = rendered.size();
  });
}

mirror_status* mirror_answer_start_chat(mirror_engine* engine, const mirror_message* messages, size_t count,
                                        const mirror_generate_options* options, mirror_answer** answer) {
  return guarded([&] {
    require(engine != nullptr && answer != nullptr, "engine or answer is NULL; pass both");
    mirror::GenerationOptions chosen = generation_options(full(options, mirror_generate_options_init));
    chosen.wants_text = true;
    // The chat format brings its own special tokens.
    const std::string rendered = engine->engine->render_chat(messages_of(messages, count));
    start(engine, engine->engine->tokenizer().encode(rendered, false), chosen, answer);
  });
}

mirror_status* mirror_answer_next(mirror_answer* answer, mirror_piece* piece, int32_t* more) {
  return guarded([&] {
    require(answer != nullptr && piece != nullptr && more != nullptr, "answer, piece or more is NULL; pass all");
    auto next = answer->answer->next();
    *more = next ? 1 : 0;
    answer->piece = next ? std::move(*next) : mirror::Answer::Piece{};
    *piece = {answer->piece.tokens.data(), answer->piece.tokens.size(), answer->piece.text.c_str(),
              answer->piece.text.size()};
  });
}

void mirror_answer_free(mirror_answer* answer) {
  // Ending may wait for a draft that fails; there is nobody left to tell.
  mirror_status_free(guarded([&] { delete answer; }));
}

mirror_status* mirror_answer_run(mirror_answer* answer, mirror_on_piece on_piece, void* user_data) {
  for (;;) {
    mirror_piece piece;
    int32_t more = 0;
    if (mirror_status* status = mirror_answer_next(answer, &piece, &more)) return status;
    if (more == 0) return nullptr;
    if (on_piece != nullptr && on_piece(&piece, user_data) != 0) return guarded([&] { answer->answer->finish(); });
  }
}

const int64_t* mirror_answer_tokens(const mirror_answer* answer, size_t* count) {
  *count = answer->answer->tokens().size();
  return answer->answer->tokens().data();
}

const char* mirror_answer_text(mirror_answer* answer, size_t* length) {
  auto text = answer->answer->text();
  *length = text ? text->size() : 0;
  if (!text) return nullptr;
  answer->text = std::move(*text);
  return answer->text.c_str();
}

mirror_finish_reason mirror_answer_finish_reason(const mirror_answer* answer) {
  if (!answer->answer->ended()) return MIRROR_FINISH_UNSET;
  return static_cast<mirror_finish_reason>(static_cast<int>(answer->answer->finish_reason()) + 1);
}

mirror_status* mirror_answer_statistics(const mirror_answer* answer, mirror_statistics* statistics) {
  return guarded([&] {
    require(answer != nullptr, "answer is NULL");
    write(statistics, statistics_of(answer->answer->statistics()));
  });
}

size_t mirror_answer_round_count(const mirror_answer* answer) { return answer->answer->rounds().size(); }

mirror_status* mirror_answer_round(const mirror_answer* answer, size_t index, mirror_round* round) {
  return guarded([&] {
    require(answer != nullptr && index < answer->answer->rounds().size(), "there is no such round");
    const mirror::Round& from = answer->answer->rounds()[index];
    write(round, mirror_round{0, mode_number(from.mode), from.proposed, from.accepted, from.committed, from.branches,
                              from.reused.has_value(), from.reused.value_or(false),
                              1e3 * mirror::seconds_between(from.start, from.end)});
  });
}

size_t mirror_answer_event_count(const mirror_answer* answer) { return answer->answer->events().size(); }

const char* mirror_answer_event(const mirror_answer* answer, size_t index) {
  const auto& events = answer->answer->events();
  return index < events.size() ? events[index].message.c_str() : nullptr;
}

double mirror_uniform(uint64_t seed, uint64_t position, uint32_t token) {
  return mirror::uniform(seed, position, token);
}

mirror_status* mirror_choose_token(const float* logits, size_t vocab_size, const int64_t* context, size_t context_count,
                                   const mirror_generate_options* options, uint64_t position, int64_t* token) {
  return guarded([&] {
    require(logits != nullptr && token != nullptr && vocab_size > 0, "logits or token is NULL, or there are no logits");
    const auto params = sampling_of(full(options, mirror_generate_options_init));
    params.check();
    const mirror::Tokens seen = tokens_of(context, context_count);
    for (const auto id : seen)
      require(id >= 0 && static_cast<std::size_t>(id) < vocab_size, "the context holds a token that has no logit");
    *token =
        mirror::Sampler(params, static_cast<int>(vocab_size), seen).choose(logits, static_cast<std::int64_t>(position));
  });
}

}  // extern "C"
