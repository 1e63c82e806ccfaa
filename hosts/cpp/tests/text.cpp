// Text against the cases of a file: `mirror_text BUNDLE CASES`, made by tests/test_hosts.py from the Python
// package's answers. A case encodes (`text`, `special`, `tokens`, `decoded`), streams with stop strings
// (`stop`), or generates (`answer`).

#include <fstream>
#include <nlohmann/json.hpp>

#include "checks.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "text_stream.hpp"
#include "unicode.hpp"

namespace {

using namespace mirror;
using Json = nlohmann::json;

// Streams tokens in groups of `size`; every piece must be whole characters.
std::string streamed(const Tokenizer& tokenizer, const Tokens& tokens, std::size_t size, Checks& checks) {
  TextStream stream(tokenizer, {});
  std::string text;
  for (std::size_t at = 0; at < tokens.size(); at += size) {
    const auto end = tokens.begin() + static_cast<std::ptrdiff_t>(std::min(tokens.size(), at + size));
    const std::string piece = stream.push(Tokens(tokens.begin() + static_cast<std::ptrdiff_t>(at), end));
    checks.check(lossy_utf8(piece) == piece, "a piece cuts a character: " + text + piece);
    text += piece;
  }
  return text + stream.finish();
}

void check_case(Checks& checks, const Tokenizer& tokenizer, const Json& item) {
  const auto tokens = item["tokens"].get<Tokens>();
  const std::string name =
      item["text"].is_null() ? "tokens " + item["tokens"].dump() : item["text"].get<std::string>().substr(0, 60);
  if (!item["text"].is_null()) checks.equal(tokenizer.encode(item["text"], item["special"]), tokens, "encode " + name);
  const std::string decoded = item["decoded"];
  checks.equal(tokenizer.decode(tokens), decoded, "decode " + name);
  for (const std::size_t size : {1, 3})
    checks.equal(streamed(tokenizer, tokens, size, checks), decoded, "stream " + name);
}

void check_stop(Checks& checks, const Tokenizer& tokenizer, const Json& item) {
  TextStream stream(tokenizer, item["stop"].get<std::vector<std::string>>());
  std::string text;
  for (const Token token : item["tokens"].get<Tokens>()) text += stream.push({token});
  text += stream.finish();
  checks.check(text == item["decoded"] && stream.stopped() == item["stopped"] &&
                   stream.kept_tokens() == item["kept"].get<std::size_t>(),
               "stop " + item["stop"].dump() + " gave " + text);
}

// The whole answer: text and tokens, in one mode.
void check_answer(Checks& checks, Engine& engine, const Json& item) {
  GenerationOptions options;
  options.max_new_tokens = item["max_new_tokens"];
  const Json& sampling = item["sampling"];
  options.sampling = {sampling["temperature"],
                      sampling["top_k"],
                      sampling["top_p"],
                      sampling["min_p"],
                      sampling["repetition_penalty"],
                      std::stoull(sampling["seed"].get<std::string>())};
  options.stop = item["stop_strings"].get<std::vector<std::string>>();
  options.mode = parse_mode(item["mode"]);
  options.wants_text = true;
  std::vector<Message> messages;
  for (const Json& message : item["messages"]) messages.push_back({message["role"], message["content"]});
  checks.equal(engine.render_chat(messages), item["prompt"].get<std::string>(), "chat format");
  const auto answer = engine.answer(engine.tokenizer().encode(item["prompt"], false), options);
  std::string text;
  while (const auto piece = answer->next()) text += piece->text;
  const std::string name = item["mode"].get<std::string>() + " " + item["sampling"].dump() + " gave " + text;
  checks.check(text == item["answer"] && answer->text() == text, "answer " + name);
  checks.equal(answer->tokens(), item["answer_tokens"].get<Tokens>(), "tokens " + name);
  checks.check(answer->events().empty(), "events " + name);
}

// Loads the bundle once there is a case that generates.
class Bundle {
 public:
  explicit Bundle(const char* folder) : folder_(folder) {}
  Engine& engine() {
    if (!engine_) {
      EngineOptions options;
      options.max_length = 256;
      engine_ = Engine::load(folder_, options);
    }
    return *engine_;
  }

 private:
  const char* folder_;
  std::shared_ptr<Engine> engine_;
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: mirror_text BUNDLE CASES\n");
    return 2;
  }
  Checks checks;
  checks.group("text", [&] {
    const Tokenizer tokenizer(arguments[1]);
    Bundle bundle(arguments[1]);
    for (const Json& item : Json::parse(std::ifstream(arguments[2]))) {
      if (item.contains("answer"))
        check_answer(checks, bundle.engine(), item);
      else if (item.contains("stop"))
        check_stop(checks, tokenizer, item);
      else
        check_case(checks, tokenizer, item);
    }
  });
  return checks.end();
}
