// What a host costs: `mirror_speed BUNDLE MODE THREADS MAX_NEW_TOKENS TOKEN...`. Prints one JSON line for
// one answer, after one that warms up; `tokens` tells whether hosts agree.

#include <cstdio>
#include <cstdlib>
#include <mirror/mirror.hpp>

int main(int count, char** arguments) {
  if (count < 6) {
    std::fprintf(stderr,
                 "usage: mirror_speed BUNDLE MODE(1 plain, 2 serial, 3 mirror) THREADS MAX_NEW_TOKENS TOKEN...\n");
    return 2;
  }
  try {
    mirror::LoadOptions load;
    load.mode = static_cast<mirror_mode>(std::atoi(arguments[2]));
    load.threads = std::atoi(arguments[3]);
    mirror::Engine engine(arguments[1], load);
    mirror::GenerateOptions options;
    options.max_new_tokens = std::atoi(arguments[4]);
    mirror::Tokens prompt;
    for (int index = 5; index < count; ++index) prompt.push_back(std::atoll(arguments[index]));
    engine.answer(prompt, options).run();
    mirror::Answer answer = engine.answer(prompt, options);
    answer.run();
    const mirror_statistics s = answer.statistics();
    std::printf(
        "{\"decode_tokens_per_s\": %.3f, \"ttft_ms\": %.3f, \"round_ms\": %.4f, \"host_ms\": %.4f, \"rounds\": %d, ",
        s.decode_tokens_per_s, 1e3 * s.ttft_s, s.round_ms, s.host_ms, s.rounds);
    std::printf("\"tokens_per_round\": %.4f, \"tokens\": [", s.tokens_per_round);
    const mirror::Tokens tokens = answer.tokens();
    for (std::size_t index = 0; index < tokens.size(); ++index)
      std::printf("%s%lld", index ? ", " : "", static_cast<long long>(tokens[index]));
    std::printf("]}\n");
  } catch (const mirror::Exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
