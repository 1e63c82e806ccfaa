/* mirror: speculative decoding of a bundle of ONNX graphs, exact and overlapped.
 *
 * This header is the stable surface of libmirror. Rules:
 *
 * Errors.    Every function that can fail returns a mirror_status*: NULL for success, else an object that
 *            owns its message (what was found, what was expected, what to do). Free it with
 *            mirror_status_free. Outputs are written on success only.
 * Ownership. What a *_load, *_start or *_encode gives is freed by the function its comment names; freeing
 *            NULL is allowed. Pointers inside a result stay valid as long as the comment says.
 * Text.      UTF-8, with its length in bytes; no terminating zero is needed. Text that comes back is valid
 *            UTF-8 and never holds half a character.
 * Structs.   Fill options with their *_init, then change what you want. struct_size lets a newer library serve
 *            an older program: new members come last, and nothing is read or written past a program's own struct.
 * Threads.   An engine makes one answer at a time: starting a second one is MIRROR_BUSY. An answer and its
 *            engine may be used from any thread, by one thread at a time, with one exception:
 *            mirror_engine_cancel may be called from any thread at any time. Different engines are independent.
 * Processes. The first load turns ONNX Runtime's usage reports off, by setting ORT_DISABLE_TELEMETRY=1 unless
 *            the environment says something else.
 */
#ifndef MIRROR_H
#define MIRROR_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(MIRROR_BUILDING)
#define MIRROR_API __declspec(dllexport)
#else
#define MIRROR_API __declspec(dllimport)
#endif
#else
#define MIRROR_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when something is added; functions are never taken away or changed under the same major number. */
#define MIRROR_API_MAJOR 1
#define MIRROR_API_MINOR 6

/* The version that the library was built with: major * 1000 + minor. */
MIRROR_API uint32_t mirror_api_version(void);

/* Statuses. */

typedef enum mirror_code {
  MIRROR_OK = 0,
  MIRROR_BUNDLE = 1,   /* a bundle is missing, incomplete, edited, or of another schema version */
  MIRROR_DEVICE = 2,   /* a device isn't there, can't take a segment, or failed */
  MIRROR_CAPACITY = 3, /* a prompt doesn't fit the KV cache */
  MIRROR_REQUEST = 4,  /* a request contradicts itself, the bundle or the engine */
  MIRROR_BUSY = 5,     /* the engine is already making an answer */
  MIRROR_INTERNAL = 6  /* out of memory, or a fault of this library */
} mirror_code;

typedef struct mirror_status mirror_status;

/* MIRROR_OK for NULL. */
MIRROR_API mirror_code mirror_status_code(const mirror_status* status);
/* Zero-terminated; valid until the status is freed. "" for NULL. */
MIRROR_API const char* mirror_status_message(const mirror_status* status);
MIRROR_API void mirror_status_free(mirror_status* status);

/* Enumerations. Zero always means: not said. */

typedef enum mirror_mode {
  MIRROR_MODE_UNSET = 0,
  MIRROR_MODE_PLAIN = 1,  /* one token per target pass */
  MIRROR_MODE_SERIAL = 2, /* draft, then verify */
  MIRROR_MODE_MIRROR = 3  /* both at once */
} mirror_mode;

typedef enum mirror_candidates {
  MIRROR_CANDIDATES_UNSET = 0,
  MIRROR_CANDIDATES_EXIT = 1,
  MIRROR_CANDIDATES_DRAFT = 2,
  MIRROR_CANDIDATES_BOTH = 3
} mirror_candidates;

typedef enum mirror_finish_reason {
  MIRROR_FINISH_UNSET = 0, /* still going on */
  MIRROR_FINISH_STOP = 1,  /* an end token or a stop string */
  MIRROR_FINISH_LENGTH = 2,
  MIRROR_FINISH_CANCELLED = 3 /* by the caller, or by an error */
} mirror_finish_reason;

/* Engines. */

typedef struct mirror_engine mirror_engine;

/* Makes a plugin's execution providers known to ONNX Runtime, under a name of your choice. Once per
 * process; a second call with the same name does nothing. For openvino:* devices register the library of
 * ONNX Runtime's OpenVINO plugin before loading. */
MIRROR_API mirror_status* mirror_register_provider_library(const char* name, const char* path);

/* Zero and NULL mean: take the bundle's setting, else the default that is named. */
typedef struct mirror_load_options {
  uint32_t struct_size;
  mirror_mode mode;             /* mirror. In plain the draft isn't loaded */
  mirror_candidates candidates; /* the draft; both for n-grams */
  int32_t threads;              /* CPU threads in all; one per physical core */
  int32_t max_length;           /* tokens of a context; the bundle's */
  int32_t gamma;                /* draft tokens of a window; the bundle's */
  int32_t kappa;                /* branches per window position; the bundle's */
  const int32_t* fanout;        /* the same by position, gamma + 1 counts; overrides kappa */
  size_t fanout_count;
  const int32_t* tokens_per_pass; /* of a rollout's passes; the last number repeats; 1 */
  size_t tokens_per_pass_count;
  const char* target_device; /* cpu, cuda:0, openvino:CPU, openvino:GPU, openvino:NPU; cpu */
  const char* suffix_device; /* the target's device */
  const char* draft_device;  /* cpu */
  int32_t pinned;            /* 1: every target pass after prefill has one width, so that the text is the same
                                in every mode at any precision */
  int32_t verify_hashes;     /* 1: check the sha256 of every file; sizes are always checked */
  double draft_timeout_s;    /* until a draft counts as hung; 30 */
  int32_t max_ngram_size;    /* of an n-gram draft's look-up; 3 */
  /* Since 1.3. The bundle's settings for these two hold where tokens_per_pass is not said either. */
  const int32_t* branches_per_pass; /* that take part in a rollout's passes, the likeliest; never rising, the last
                                       number repeats; all */
  size_t branches_per_pass_count;
  const int32_t* proposal_tokens_per_pass; /* of a proposal's passes, which the target waits for; tokens_per_pass */
  size_t proposal_tokens_per_pass_count;
  /* Since 1.4. */
  int32_t draft_context; /* tokens of a context's end that the draft reads at most, 2 or more; all */
} mirror_load_options;

/* Fills a struct of the size that the program has. Since 1.3; programs say mirror_load_options_init(&options). */
MIRROR_API void mirror_load_options_init_sized(mirror_load_options* options, size_t size);
/* What programs built against 1.2 or older call: fills as much as they have. */
MIRROR_API void mirror_load_options_init(mirror_load_options* options);
#define mirror_load_options_init(options) mirror_load_options_init_sized((options), sizeof(mirror_load_options))

/* Loads the bundle in a folder; options may be NULL. Free with mirror_engine_free. */
MIRROR_API mirror_status* mirror_engine_load(const char* folder, const mirror_load_options* options,
                                             mirror_engine** engine);
/* An answer that is still being made keeps what it needs, and ends as cancelled. */
MIRROR_API void mirror_engine_free(mirror_engine* engine);
/* Stops the answer being made after its current round; does nothing when there is none. Any thread. */
MIRROR_API void mirror_engine_cancel(mirror_engine* engine);

typedef struct mirror_engine_facts {
  uint32_t struct_size;
  mirror_mode mode;
  int32_t vocab_size, gamma, max_length, branches;
  int32_t target_threads, draft_threads;
  int32_t recorded_passes;   /* passes that its GPUs have recorded and replay, so far. Since 1.2 */
  const char* draft_kernels; /* what this library's own kernels run the draft with: "amx", "avx512" or "avx2"; NULL
                                where ONNX Runtime runs it, or none is loaded. Static. Since 1.5 */
  const char* notices;       /* what its devices do without though it was asked for or is usual, such as our kernels on
                                a GPU, a line of UTF-8 each; NULL where there is nothing to say. The engine's.
                                Since 1.6 */
} mirror_engine_facts;

/* Set struct_size first. */
MIRROR_API mirror_status* mirror_engine_describe(const mirror_engine* engine, mirror_engine_facts* facts);

/* Checks a bundle without loading it: the manifest, and every file's size, or its hash too. */
MIRROR_API mirror_status* mirror_bundle_check(const char* folder, int32_t verify_hashes);

/* Text. */

/* Token ids of a text. add_special_tokens: 1 for plain text; 0 for a prompt in the model's chat format, which
 * brings its own. Free *tokens with mirror_tokens_free. */
MIRROR_API mirror_status* mirror_engine_encode(mirror_engine* engine, const char* text, size_t length,
                                               int32_t add_special_tokens, int64_t** tokens, size_t* count);
MIRROR_API void mirror_tokens_free(int64_t* tokens);
/* Text of token ids, special tokens left out; zero-terminated too. Free *text with mirror_text_free. */
MIRROR_API mirror_status* mirror_engine_decode(mirror_engine* engine, const int64_t* tokens, size_t count, char** text,
                                               size_t* length);
MIRROR_API void mirror_text_free(char* text);

/* One message of a conversation. */
typedef struct mirror_message {
  const char* role;    /* system, user or assistant; zero-terminated */
  const char* content; /* UTF-8 */
  size_t content_length;
} mirror_message;

/* Messages in the model's chat format, ending where the assistant's answer begins: an optional system message, then
 * user and assistant in turn, the user last. MIRROR_REQUEST where the bundle has no such format, or it doesn't cover
 * them. The text brings its special tokens. Since 1.1. Free *text with mirror_text_free. */
MIRROR_API mirror_status* mirror_engine_render_chat(mirror_engine* engine, const mirror_message* messages, size_t count,
                                                    char** text, size_t* length);

/* Answers. */

typedef struct mirror_answer mirror_answer;

typedef struct mirror_generate_options {
  uint32_t struct_size;
  mirror_mode mode;          /* unset: the engine's */
  int64_t max_new_tokens;    /* 128 */
  double temperature;        /* 0: greedy */
  int64_t top_k;             /* 0: all */
  double top_p;              /* 1: all */
  double min_p;              /* 0: all */
  double repetition_penalty; /* 1: none */
  uint64_t seed;
  const char* const* stop; /* zero-terminated strings that end the text and are left out of it */
  size_t stop_count;
  int32_t num_assistant_tokens; /* the most draft tokens of a round; 0: gamma */
  int32_t reuse_cache;          /* 1: keep what the prompt has in common with the engine's last context */
  int32_t text;                 /* 1: make text also where the prompt is token ids */
  int32_t add_special_tokens;   /* for a prompt that is text, as in mirror_engine_encode; 1 */
} mirror_generate_options;

MIRROR_API void mirror_generate_options_init(mirror_generate_options* options);

/* Begin an answer; options may be NULL. The engine is busy until the answer has ended or is freed. Free with
 * mirror_answer_free. */
MIRROR_API mirror_status* mirror_answer_start_tokens(mirror_engine* engine, const int64_t* tokens, size_t count,
                                                     const mirror_generate_options* options, mirror_answer** answer);
MIRROR_API mirror_status* mirror_answer_start_text(mirror_engine* engine, const char* text, size_t length,
                                                   const mirror_generate_options* options, mirror_answer** answer);

/* The same for a conversation, as mirror_engine_render_chat renders it. Since 1.1. */
MIRROR_API mirror_status* mirror_answer_start_chat(mirror_engine* engine, const mirror_message* messages, size_t count,
                                                   const mirror_generate_options* options, mirror_answer** answer);

/* What one round committed. Valid until the next call with this answer. */
typedef struct mirror_piece {
  const int64_t* tokens;
  size_t token_count;
  const char* text; /* what has settled; may be empty */
  size_t text_length;
} mirror_piece;

/* Runs one round. *more is 1 and *piece is filled, or *more is 0: the answer is complete. */
MIRROR_API mirror_status* mirror_answer_next(mirror_answer* answer, mirror_piece* piece, int32_t* more);
/* Ends an answer that isn't complete; what it has stays readable. */
MIRROR_API void mirror_answer_free(mirror_answer* answer);

/* Called with each piece; a return value other than 0 stops the answer. Must not call into the answer. */
typedef int32_t (*mirror_on_piece)(const mirror_piece* piece, void* user_data);

/* Runs an answer to its end; on_piece may be NULL. */
MIRROR_API mirror_status* mirror_answer_run(mirror_answer* answer, mirror_on_piece on_piece, void* user_data);

/* The answer so far; pointers are valid until the next round or until the answer is freed. */
MIRROR_API const int64_t* mirror_answer_tokens(const mirror_answer* answer, size_t* count);
/* NULL for an answer without text. */
MIRROR_API const char* mirror_answer_text(mirror_answer* answer, size_t* length);
MIRROR_API mirror_finish_reason mirror_answer_finish_reason(const mirror_answer* answer);

/* Counts and times, named as in the Python package. What has nothing to be divided by is NaN. */
typedef struct mirror_statistics {
  uint32_t struct_size;
  int32_t prompt_tokens, reused_prompt_tokens, generated_tokens, rounds;
  int32_t draft_tokens_proposed, draft_tokens_accepted, target_forward_passes, redrafts;
  double acceptance_rate, tokens_per_round, reuse_rate, branches_per_round, ttft_s, decode_tokens_per_s, draft_hidden;
  double round_ms, prefix_ms, exit_head_ms, suffix_ms, trunk_ms, rollout_ms, propose_ms, candidate_wait_ms,
      rollout_wait_ms, redraft_ms, host_ms;
} mirror_statistics;

/* Set struct_size first. */
MIRROR_API mirror_status* mirror_answer_statistics(const mirror_answer* answer, mirror_statistics* statistics);

typedef struct mirror_round {
  uint32_t struct_size;
  mirror_mode mode;
  int32_t proposed, accepted, committed, branches;
  int32_t wanted_branch; /* 1 if a prepared branch was wanted after it */
  int32_t reused;        /* 1 if there was one that fitted */
  double duration_ms;
} mirror_round;

MIRROR_API size_t mirror_answer_round_count(const mirror_answer* answer);
/* Set struct_size first. */
MIRROR_API mirror_status* mirror_answer_round(const mirror_answer* answer, size_t index, mirror_round* round);

/* What the user should hear of, such as a draft that was lost; the text is unharmed by it. */
MIRROR_API size_t mirror_answer_event_count(const mirror_answer* answer);
/* Zero-terminated; valid until the next round or until the answer is freed. NULL past the last one. */
MIRROR_API const char* mirror_answer_event(const mirror_answer* answer, size_t index);

/* The law of sampling, alone (docs/sampling.md): for hosts that check themselves against tests/vectors. */

/* The uniform in (0, 1) of a seed, an absolute position and a token. */
MIRROR_API double mirror_uniform(uint64_t seed, uint64_t position, uint32_t token);
/* The token that the target takes at a position, from its logits and the context's tokens. */
MIRROR_API mirror_status* mirror_choose_token(const float* logits, size_t vocab_size, const int64_t* context,
                                              size_t context_count, const mirror_generate_options* options,
                                              uint64_t position, int64_t* token);

#ifdef __cplusplus
}
#endif

#endif
