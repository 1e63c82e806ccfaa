// Answers a question with a bundle, piece by piece:
//
//   mirror_generate BUNDLE "Why is the sky blue?" [TARGET_DEVICE [DRAFT_DEVICE]]
//
// Ctrl-C ends the answer after the round under way.

#include <csignal>
#include <iostream>
#include <mirror/mirror.hpp>

namespace {

mirror::Engine* running = nullptr;

void cancel(int) { running->cancel(); }

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::cerr << "usage: mirror_generate BUNDLE QUESTION [TARGET_DEVICE [DRAFT_DEVICE]]\n";
    return 2;
  }
  try {
    mirror::LoadOptions load;
    if (count > 3) load.target_device = arguments[3];
    if (count > 4) load.draft_device = arguments[4];
    mirror::Engine engine(arguments[1], load);
    running = &engine;
    std::signal(SIGINT, cancel);

    mirror::GenerateOptions options;
    options.max_new_tokens = 200;
    mirror::Answer answer = engine.answer(mirror::Messages{{"user", arguments[2]}}, options);
    for (const mirror::Piece& piece : answer) std::cout << piece.text << std::flush;

    const mirror_statistics statistics = answer.statistics();
    std::cerr << "\n"
              << statistics.generated_tokens << " tokens, " << statistics.decode_tokens_per_s << " tokens/s, "
              << statistics.tokens_per_round << " tokens a round\n";
    for (const std::string& message : answer.events()) std::cerr << message << "\n";
  } catch (const mirror::Exception& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
  }
}
