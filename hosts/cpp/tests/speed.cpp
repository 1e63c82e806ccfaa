// A host to be measured: `mirror_speed BUNDLE [KEY=VALUE]...`. Reads prompts, one a line, as token ids, maybe after
// mode=NUMBER; prints a JSON line for each answer. Keys: mode (a number of mirror_mode), threads, tokens, temperature,
// target, draft, pinned, plugin.

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <mirror/mirror.hpp>
#include <sstream>

namespace {

using Settings = std::map<std::string, std::string>;

Settings settings_of(int count, char** arguments) {
  Settings settings = {{"mode", "0"}, {"threads", "0"}, {"tokens", "64"}, {"temperature", "0"}, {"pinned", "0"}};
  for (int index = 2; index < count; ++index) {
    const std::string text = arguments[index];
    settings[text.substr(0, text.find('='))] = text.substr(text.find('=') + 1);
  }
  return settings;
}

mirror::LoadOptions load_options(const Settings& settings) {
  const auto device = [&](const char* key) {
    const auto found = settings.find(key);
    return found == settings.end() ? nullptr : found->second.c_str();
  };
  mirror::LoadOptions load;
  load.mode = static_cast<mirror_mode>(std::stoi(settings.at("mode")));
  load.threads = std::stoi(settings.at("threads"));
  load.pinned = std::stoi(settings.at("pinned"));
  load.target_device = device("target");
  load.draft_device = device("draft");
  return load;
}

void print(const mirror::Engine& engine, const mirror::Answer& answer) {
  const mirror_statistics s = answer.statistics();
  std::printf("{\"decode_tokens_per_s\": %.4f, \"ttft_ms\": %.3f, \"round_ms\": %.5f, \"host_ms\": %.5f, ",
              s.decode_tokens_per_s, 1e3 * s.ttft_s, s.round_ms, s.host_ms);
  const mirror_engine_facts facts = engine.facts();
  std::printf("\"rounds\": %d, \"draft_tokens_accepted\": %d, \"recorded_passes\": %d, \"draft_kernels\": \"%s\", ",
              s.rounds, s.draft_tokens_accepted, facts.recorded_passes,
              facts.draft_kernels == nullptr ? "" : facts.draft_kernels);
  std::printf("\"events\": %zu, \"tokens\": [", answer.events().size());
  const mirror::Tokens tokens = answer.tokens();
  for (std::size_t index = 0; index < tokens.size(); ++index)
    std::printf("%s%lld", index ? ", " : "", static_cast<long long>(tokens[index]));
  std::printf("]}\n");
  std::fflush(stdout);
  for (const std::string& event : answer.events()) std::fprintf(stderr, "%s\n", event.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: mirror_speed BUNDLE [KEY=VALUE]...\n");
    return 2;
  }
  try {
    const Settings settings = settings_of(count, arguments);
    if (settings.count("plugin") > 0)
      mirror::check(mirror_register_provider_library("OpenVINO", settings.at("plugin").c_str()));
    mirror::Engine engine(arguments[1], load_options(settings));
    mirror::GenerateOptions options;
    options.max_new_tokens = std::stoll(settings.at("tokens"));
    options.temperature = std::stod(settings.at("temperature"));
    for (std::string line; std::getline(std::cin, line);) {
      options.mode = MIRROR_MODE_UNSET;
      if (line.rfind("mode=", 0) == 0) {
        options.mode = static_cast<mirror_mode>(std::stoi(line.substr(5)));
        line.erase(0, line.find(' '));
      }
      std::istringstream words(line);
      mirror::Tokens prompt;
      for (std::int64_t token = 0; words >> token;) prompt.push_back(token);
      mirror::Answer answer = engine.answer(prompt, options);
      answer.run();
      print(engine, answer);
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
