/* mirror.h from C: `mirror_c_api BUNDLES`. */

#include <math.h>
#include <mirror/mirror.h>
#include <stdio.h>
#include <string.h>

static int passed, failed;

static void check(int holds, const char* what) {
  if (holds) {
    ++passed;
  } else {
    ++failed;
    printf("FAILED %s\n", what);
  }
}

/* A status of this code whose message holds a text; frees it. */
static void refused(mirror_status* status, mirror_code code, const char* text) {
  const int right = mirror_status_code(status) == code && strstr(mirror_status_message(status), text) != NULL;
  if (!right) printf("  found %d: %s\n", (int)mirror_status_code(status), mirror_status_message(status));
  check(right, text);
  mirror_status_free(status);
}

static void succeeds(mirror_status* status, const char* what) {
  if (status != NULL) printf("  %s\n", mirror_status_message(status));
  check(status == NULL, what);
  mirror_status_free(status);
}

static const int64_t prompt[] = {1, 2, 3, 4, 5, 6, 7};
static const int64_t expected[] = {18, 22, 6, 18, 20, 4, 15, 10, 16, 15};

static int32_t stop_after_three(const mirror_piece* piece, void* user_data) {
  int64_t* total = user_data;
  *total += (int64_t)piece->token_count;
  return *total >= 3;
}

static void options_that_are_wrong(const char* bundle) {
  mirror_engine* engine = NULL;
  mirror_load_options options;
  mirror_load_options_init(&options);
  options.target_device = "tpu";
  refused(mirror_engine_load(bundle, &options, &engine), MIRROR_DEVICE, "no device is called 'tpu'");
  mirror_load_options_init(&options);
  options.kappa = 9;
  refused(mirror_engine_load(bundle, &options, &engine), MIRROR_REQUEST, "kappa is 9");
  options.mode = (mirror_mode)17;
  refused(mirror_engine_load(bundle, &options, &engine), MIRROR_REQUEST, "MIRROR_MODE_");
  memset(&options, 0, sizeof options);
  refused(mirror_engine_load(bundle, &options, &engine), MIRROR_REQUEST, "struct_size is not set");
  const int32_t rising[] = {2, 3};
  mirror_load_options_init(&options);
  options.branches_per_pass = rising;
  options.branches_per_pass_count = 2;
  refused(mirror_engine_load(bundle, &options, &engine), MIRROR_REQUEST, "branches_per_pass is (2, 3)");
  mirror_load_options_init(&options);
  options.proposal_tokens_per_pass = rising;
  options.proposal_tokens_per_pass_count = 1;
  refused(mirror_engine_load(bundle, &options, &engine), MIRROR_REQUEST, "proposal_tokens_per_pass is (2,)");
  mirror_load_options_init(&options);
  options.draft_context = 1;
  refused(mirror_engine_load(bundle, &options, &engine), MIRROR_REQUEST, "draft_context is 1");
  refused(mirror_engine_load(NULL, NULL, &engine), MIRROR_REQUEST, "NULL");
  refused(mirror_engine_load("/no/such/folder", NULL, &engine), MIRROR_BUNDLE, "the folder does not exist");
  check(engine == NULL, "a failed load gives no engine");
}

static void an_older_program(const char* bundle) {
  /* Knows nothing past `threads`: what follows keeps its default. */
  mirror_load_options options;
  mirror_engine* engine = NULL;
  memset(&options, 0xAB, sizeof options);
  options.struct_size = (uint32_t)offsetof(mirror_load_options, max_length);
  options.mode = MIRROR_MODE_PLAIN;
  options.candidates = MIRROR_CANDIDATES_UNSET;
  options.threads = 1;
  succeeds(mirror_engine_load(bundle, &options, &engine), "an older program's options");
  mirror_engine_facts facts;
  facts.struct_size = sizeof facts;
  succeeds(mirror_engine_describe(engine, &facts), "describe");
  check(facts.mode == MIRROR_MODE_PLAIN && facts.vocab_size == 23 && facts.gamma == 3 && facts.max_length == 64 &&
            facts.recorded_passes == 0 && facts.draft_kernels == NULL && facts.notices == NULL,
        "facts");
  mirror_engine_free(engine);
}

static void a_program_of_1_2(const char* bundle) {
  /* Its struct ends before branches_per_pass; what lies behind is its own. */
  const size_t size = offsetof(mirror_load_options, branches_per_pass);
  mirror_load_options options;
  mirror_engine* engine = NULL;
  unsigned char behind[sizeof options];
  memset(&options, 0xAB, sizeof options);
  memset(behind, 0xAB, sizeof behind);
  (mirror_load_options_init)(&options); /* the function, not the macro that newer programs see */
  check(memcmp((unsigned char*)&options + size, behind, sizeof options - size) == 0, "nothing behind it is written");
  check(options.struct_size == size && options.max_ngram_size == 3 && options.kappa == 0, "its members are filled");
  succeeds(mirror_engine_load(bundle, &options, &engine), "a program of 1.2 loads");
  mirror_engine_free(engine);
}

static void answers(mirror_engine* engine) {
  mirror_generate_options options;
  mirror_answer* answer = NULL;
  mirror_answer* second = NULL;
  size_t count = 0, length = 0;
  int64_t total = 0;
  mirror_generate_options_init(&options);
  options.max_new_tokens = 10;
  succeeds(mirror_answer_start_tokens(engine, prompt, 7, &options, &answer), "start");
  refused(mirror_answer_start_tokens(engine, prompt, 7, &options, &second), MIRROR_BUSY, "already making an answer");
  check(mirror_answer_finish_reason(answer) == MIRROR_FINISH_UNSET, "it goes on");
  succeeds(mirror_answer_run(answer, NULL, NULL), "run");
  check(memcmp(mirror_answer_tokens(answer, &count), expected, sizeof expected) == 0 && count == 10, "tokens");
  check(mirror_answer_finish_reason(answer) == MIRROR_FINISH_LENGTH, "length");
  check(mirror_answer_text(answer, &length) == NULL && length == 0, "no text");
  mirror_statistics statistics;
  statistics.struct_size = sizeof statistics;
  succeeds(mirror_answer_statistics(answer, &statistics), "statistics");
  check(statistics.generated_tokens == 10 && statistics.prompt_tokens == 7 && statistics.rounds > 0, "counts");
  mirror_round round;
  round.struct_size = sizeof round;
  check(mirror_answer_round_count(answer) == (size_t)statistics.rounds, "rounds");
  succeeds(mirror_answer_round(answer, 0, &round), "the first round");
  check(round.mode == MIRROR_MODE_MIRROR && round.proposed == 3 && round.branches > 0, "its counts");
  refused(mirror_answer_round(answer, 99, &round), MIRROR_REQUEST, "no such round");
  check(mirror_answer_event_count(answer) == 0 && mirror_answer_event(answer, 0) == NULL, "no events");
  mirror_answer_free(answer);

  succeeds(mirror_answer_start_tokens(engine, prompt, 7, &options, &answer), "start again");
  succeeds(mirror_answer_run(answer, stop_after_three, &total), "stopped by the callback");
  check(mirror_answer_finish_reason(answer) == MIRROR_FINISH_CANCELLED && total >= 3 && total < 10, "cancelled");
  mirror_answer_free(answer);

  options.mode = MIRROR_MODE_PLAIN;
  succeeds(mirror_answer_start_tokens(engine, prompt, 7, &options, &answer), "start plain");
  mirror_piece piece;
  int32_t more = 0;
  succeeds(mirror_answer_next(answer, &piece, &more), "next");
  check(more == 1 && piece.token_count == 1 && piece.tokens[0] == 18 && piece.text_length == 0, "a piece");
  mirror_answer_free(answer);
  statistics.struct_size = 0;
  mirror_answer_free(NULL);
}

static void text_without_a_tokenizer(mirror_engine* engine) {
  mirror_answer* answer = NULL;
  int64_t* tokens = NULL;
  size_t count = 0;
  refused(mirror_engine_encode(engine, "hello", 5, 1, &tokens, &count), MIRROR_REQUEST, "no tokenizer.json");
  refused(mirror_answer_start_text(engine, "hello", 5, NULL, &answer), MIRROR_REQUEST, "no tokenizer.json");
}

static void chat_formats(const char* bundles) {
  const mirror_message messages[] = {{"system", "Be brief.", 9}, {"user", "a b", 3}};
  const char* expected =
      "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n";
  mirror_load_options options;
  mirror_engine* engine = NULL;
  mirror_answer* answer = NULL;
  char folder[4096];
  char* text = NULL;
  size_t length = 0;
  mirror_load_options_init(&options);
  options.mode = MIRROR_MODE_PLAIN;
  snprintf(folder, sizeof folder, "%s/chat-default-system", bundles);
  succeeds(mirror_engine_load(folder, &options, &engine), "load a bundle with a chat format");
  succeeds(mirror_engine_render_chat(engine, messages, 2, &text, &length), "render");
  check(length == strlen(expected) && strcmp(text, expected) == 0, "the chat format");
  mirror_text_free(text);
  refused(mirror_engine_render_chat(engine, messages, 1, &text, &length), MIRROR_REQUEST, "no answer after system");
  refused(mirror_engine_render_chat(engine, NULL, 0, &text, &length), MIRROR_REQUEST, "list of messages is empty");
  refused(mirror_engine_render_chat(engine, NULL, 1, &text, &length), MIRROR_REQUEST, "messages is NULL");
  refused(mirror_answer_start_chat(engine, messages, 2, NULL, &answer), MIRROR_REQUEST, "no tokenizer.json");
  mirror_engine_free(engine);
  snprintf(folder, sizeof folder, "%s/alone", bundles);
  succeeds(mirror_engine_load(folder, &options, &engine), "load a bundle without a chat format");
  refused(mirror_engine_render_chat(engine, messages, 2, &text, &length), MIRROR_REQUEST, "no chat format as data");
  mirror_engine_free(engine);
}

static void the_law_alone(void) {
  const float logits[] = {1, 4, 4, -2};
  const int64_t context[] = {1};
  mirror_generate_options options;
  int64_t token = -1;
  mirror_generate_options_init(&options);
  succeeds(mirror_choose_token(logits, 4, NULL, 0, &options, 0, &token), "choose");
  check(token == 1, "the lowest id on ties");
  options.repetition_penalty = 2.0;
  succeeds(mirror_choose_token(logits, 4, context, 1, &options, 0, &token), "choose with a penalty");
  check(token == 2, "the penalty counts");
  options.top_p = 0.0;
  refused(mirror_choose_token(logits, 4, context, 1, &options, 0, &token), MIRROR_REQUEST,
          "top_p is 0; it must be above 0");
  check(mirror_uniform(0, 0, 0) > 0.0 && mirror_uniform(0, 0, 0) < 1.0, "a uniform");
}

int main(int count, char** arguments) {
  char bundle[4096];
  mirror_engine* engine = NULL;
  if (count != 2) {
    fprintf(stderr, "usage: mirror_c_api BUNDLES\n");
    return 2;
  }
  snprintf(bundle, sizeof bundle, "%s/context", arguments[1]);
  check(mirror_api_version() == MIRROR_API_MAJOR * 1000 + MIRROR_API_MINOR, "version");
  check(mirror_status_code(NULL) == MIRROR_OK && strcmp(mirror_status_message(NULL), "") == 0, "no status is success");
  options_that_are_wrong(bundle);
  an_older_program(bundle);
  a_program_of_1_2(bundle);
  succeeds(mirror_bundle_check(bundle, 1), "the bundle is whole");
  succeeds(mirror_engine_load(bundle, NULL, &engine), "load");
  answers(engine);
  text_without_a_tokenizer(engine);
  chat_formats(arguments[1]);
  the_law_alone();
  mirror_engine_free(engine);
  mirror_engine_free(NULL);
  printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
