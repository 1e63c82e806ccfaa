// Drafts that our own kernels run: `mirror_program BUNDLE`, a bundle whose draft has a program and is its target once
// more, so that most of its guesses are right.

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "checks.hpp"
#include "draft_program.hpp"
#include "engine.hpp"
#include "environment.hpp"
#include "error.hpp"
#include "kernel_segment.hpp"

namespace {

using namespace mirror;
namespace fs = std::filesystem;
using Json = nlohmann::json;

fs::path bundle;
Checks checks;
const char* const program_name = "draft_int8.json";

// The CPU, with threads of its own for a draft: target and draft share the engine's.
class TeamDevice final : public Device {
 public:
  explicit TeamDevice(int threads) : threads_(threads) {}
  const std::string& name() const override { return inner_->name(); }
  Form form() const override { return inner_->form(); }
  bool int8_drafts() const override { return inner_->int8_drafts(); }
  bool runs_programs() const override { return inner_->runs_programs(); }
  const char* draft_kernels() const override { return inner_->draft_kernels(); }
  std::unique_ptr<Segment> load_segment(const fs::path& folder, const SegmentFacts& facts, int capacity,
                                        const std::vector<PassShape>& shapes, const std::vector<PassShape>& later,
                                        int) override {
    return inner_->load_segment(folder, facts, capacity, shapes, later, threads_);
  }

 private:
  std::shared_ptr<Device> inner_ = open_device("cpu");
  int threads_;
};

EngineOptions in_mode(Mode mode) {
  EngineOptions options;
  options.mode = mode;
  options.threads = 1;
  options.branches_per_pass = std::vector<int>{7, 5};
  return options;
}

// Without ends of texts: a random model's come early.
std::shared_ptr<Engine> load(const fs::path& folder, Manifest manifest, Mode mode, int draft_threads = 1) {
  manifest.tokens.eos.clear();
  const auto target = open_device("cpu");
  const Placement places{target, target, std::make_shared<TeamDevice>(draft_threads)};
  return std::make_shared<Engine>(folder, std::move(manifest), in_mode(mode), places);
}

std::shared_ptr<Engine> load(Mode mode, int draft_threads = 1) {
  return load(bundle, read_manifest(bundle), mode, draft_threads);
}

struct Said {
  std::vector<Tokens> tokens;
  int proposed = 0, accepted = 0;
};

Said answers(Engine& engine, const SamplingParams& sampling) {
  Said said;
  for (const Tokens& prompt : {Tokens{1, 5, 9, 40, 7}, Tokens{1, 80}, Tokens(37, 33)}) {
    GenerationOptions options;
    options.max_new_tokens = 80;
    options.sampling = sampling;
    const auto answer = engine.answer(prompt, options);
    while (answer->next()) {
    }
    said.tokens.push_back(answer->tokens());
    said.proposed += answer->statistics().draft_tokens_proposed;
    said.accepted += answer->statistics().draft_tokens_accepted;
    checks.check(answer->events().empty(), "no draft is lost");
  }
  return said;
}

// The text doesn't depend on who drafts, and the kernels' guesses are right as often as ONNX Runtime's.
void drafts_alike(const SamplingParams& sampling) {
  choose("off");
  const auto plain = answers(*load(Mode::plain), sampling);
  for (const Mode mode : {Mode::serial, Mode::mirror}) {
    choose("off");
    const auto without = load(mode);
    checks.check(without->draft_kernels() == nullptr, "off is off");
    const Said by_onnxruntime = answers(*without, sampling);
    checks.equal(by_onnxruntime.tokens, plain.tokens, "the same text by ONNX Runtime");
    for (const char* kernels : {"amx", "avx512", "avx2"})
      for (const int threads : {1, 2, 3}) {
        choose(nullptr);
        const char* best = chosen_kernels();
        if (best == nullptr) continue;
        const std::string what =
            std::string(kernels) + " in mode " + to_string(mode) + " by " + std::to_string(threads);
        choose(kernels);
        try {
          const auto engine = load(mode, threads);
          checks.check(engine->draft_kernels() == std::string(kernels), what + " is in use");
          const Said said = answers(*engine, sampling);
          checks.equal(said.tokens, plain.tokens, "the same text: " + what);
          checks.check(said.accepted * 10 > by_onnxruntime.accepted * 8,
                       what + ": " + std::to_string(said.accepted) + " guesses are right, by ONNX Runtime " +
                           std::to_string(by_onnxruntime.accepted) + " of " + std::to_string(said.proposed));
        } catch (const Error& error) {
          const std::string expected =
              "MIRROR_KERNELS is " + std::string(kernels) + " and this CPU's best are " + best + "; leave it unset";
          checks.equal(std::string(error.what()), expected, what);
        }
      }
  }
  choose(nullptr);
}

template <typename Run>
void refused(Run run, ErrorKind kind, const std::string& part) {
  try {
    run();
    checks.check(false, "nobody says " + part);
  } catch (const Error& error) {
    const std::string said = error.what();
    checks.check(error.kind() == kind && said.find(part) != std::string::npos, part + ", said: " + said);
  }
}

void the_environment_is_heard() {
  choose("sse");
  refused([] { Engine::load(bundle, in_mode(Mode::serial)); }, ErrorKind::device,
          "MIRROR_KERNELS is sse; give one of amx, avx512, avx2, off, or leave it unset");
  choose(" OFF ");
  checks.check(chosen_kernels() == nullptr, "off, in capitals");
  choose("");
  checks.check(chosen_kernels() == nullptr ||
                   Engine::load(bundle, in_mode(Mode::serial))->draft_kernels() == std::string(chosen_kernels()),
               "the best are chosen");
  choose(nullptr);
  if (chosen_kernels() == nullptr) {
    choose("avx2");
    refused(chosen_kernels, ErrorKind::device,
            "MIRROR_KERNELS is avx2 and this library has no kernels for this CPU; leave it unset");
  }
  // Without a draft nobody asks.
  choose("sse");
  Engine::load(bundle, in_mode(Mode::plain));
  choose(nullptr);
}

void weights_are_counted_once() {
  const Manifest manifest = read_manifest(bundle);
  const EngineOptions options = in_mode(Mode::serial);
  const Plan plan = make_plan(manifest, options, true);
  checks.check(plan.draft_capacity() % 16 == 0 && plan.draft_capacity() - plan.draft_context >= plan.rollout_slots(),
               "a draft's cache has whole blocks of keys");
  for (const bool off : {true, false}) {
    choose(off ? "off" : nullptr);
    std::uint64_t trunk = 0, branch = 0;
    for (const MemoryNeed& need : memory_needs(bundle, manifest, plan, open_devices(manifest, options)))
      for (const SegmentMemory& segment : need.segments)
        (segment.name == "draft_trunk" ? trunk
         : segment.name == "draft"     ? branch
                                       : branch) += segment.name.rfind("draft", 0) == 0 ? segment.weight_bytes : 0;
    checks.check(branch > 0 && (trunk > 0) == (chosen_kernels() == nullptr), "weights of a draft's two segments");
  }
}

// The bundle once more, for programs that are edited.
class Edited {
 public:
  Edited()
      : folder_(fs::temp_directory_path() /
                ("mirror-program-" + std::to_string(Clock::now().time_since_epoch().count()))) {
    fs::copy(bundle, folder_, fs::copy_options::recursive);
    whole_ = Json::parse(std::ifstream(bundle / program_name));
  }
  ~Edited() { fs::remove_all(folder_); }

  const fs::path& folder() const { return folder_; }
  Json whole() const { return whole_; }
  void write(const std::string& text) const { std::ofstream(folder_ / program_name) << text; }

 private:
  fs::path folder_;
  Json whole_;
};

void programs_that_are_broken() {
  const Edited edited;
  const auto read = [&edited] { read_draft_program(edited.folder(), program_name); };
  read();
  const auto with = [&](const char* pointer, const Json& value, const std::string& part) {
    Json program = edited.whole();
    program[Json::json_pointer(pointer)] = value;
    edited.write(program.dump());
    refused(read, ErrorKind::bundle, part);
  };
  with("/hidden", 0, "at hidden: 0 is less than the minimum of 1");
  with("/heads", 1 << 20, "at heads: 1048576 is more than any draft has");
  with("/hidden", 80, "[96, 64] is not [96, 80]");
  with("/inner", "48", "at inner: '48' is not of type 'integer'");
  with("/epsilon", "small", "at epsilon: 'small' is not of type 'number'");
  with("/layers/1/qkv/values/dtype", "uint8", "at layers.1.qkv.values.dtype: 'uint8' is not one of ['int8']");
  with("/layers/0/down/scales", nullptr, "at layers.0.down.scales: None is not of type 'object'");
  with("/layers/0/down/values/offset", 1ull << 40, "are wanted");
  with("/layers/0/down/values/file", "weights/none.bin", "can't be read");
  with("/embedding/kind", "blocks_2", "at embedding.kind: 'blocks_2' is not one of");
  with("/head/values/shape", {64}, "at head.values.shape: it is not that of a matrix");
  with("/norm", {{"dtype", "float32"}, {"shape", {64}}, {"data", "AAAA"}}, "there are not the 256 bytes of its shape");
  Json program = edited.whole();
  program.erase("sines");
  edited.write(program.dump());
  refused(read, ErrorKind::bundle, "'sines' is a required property; export the bundle again");
  edited.write("{");
  refused(read, ErrorKind::bundle, "is not readable JSON");
  fs::remove(edited.folder() / program_name);
  refused(read, ErrorKind::bundle, "it can't be opened");
}

void programs_that_others_run() {
  const Edited edited;
  const Manifest manifest = read_manifest(bundle);
  const auto load_edited = [&edited](const Manifest& read) { return load(edited.folder(), read, Mode::serial); };
  Json program = edited.whole();
  program["format"] = 2;
  edited.write(program.dump());
  const auto graphs = load_edited(manifest);
  checks.check(graphs->draft_kernels() == nullptr && answers(*graphs, {}).accepted > 0,
               "the graphs are run where the format is another");
  if (chosen_kernels() == nullptr) return;
  program = edited.whole();
  edited.write(program.dump());
  checks.check(load_edited(manifest)->draft_kernels() != nullptr, "an edited bundle's program is run");
  Manifest other = manifest;
  other.segments.at("draft_int8").kv.pop_back();
  refused([&] { load_edited(other); }, ErrorKind::bundle, "draft has another cache than draft_int8.json says");
  other = manifest;
  other.segments.at("draft_int8").program.reset();
  refused([&] { load_edited(other); }, ErrorKind::bundle, "have different programs");
  other = manifest;
  for (TensorSpec& spec : other.segments.at("draft_trunk_int8").graphs.at(Form::inplace).outputs)
    if (spec.name == "candidate_ids") spec.shape[2] = std::int64_t{1000};
  refused([&] { load_edited(other); }, ErrorKind::bundle, "more candidates than its program has tokens");
  // What a tensor's bytes say inside the file is the same as what they say in another.
  std::ifstream weights(bundle / program["norm"]["file"].get<std::string>(), std::ios::binary);
  std::string norm(program["norm"]["bytes"].get<std::size_t>(), 0);
  weights.seekg(program["norm"]["offset"].get<std::streamoff>());
  weights.read(norm.data(), static_cast<std::streamsize>(norm.size()));
  std::ofstream(edited.folder() / "odd.bin", std::ios::binary) << "odd" << norm;
  program["norm"]["file"] = "odd.bin";
  program["norm"]["offset"] = 3;
  edited.write(program.dump());
  checks.equal(answers(*load_edited(manifest), {}).accepted, answers(*load(Mode::serial), {}).accepted,
               "a tensor at an odd place");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: mirror_program BUNDLE\n");
    return 2;
  }
  bundle = arguments[1];
  checks.group("greedy", [] { drafts_alike({}); });
  SamplingParams drawn;
  drawn.temperature = 0.9;
  drawn.seed = 3;
  checks.group("drawn", [&] { drafts_alike(drawn); });
  checks.group("environment", the_environment_is_heard);
  checks.group("memory", weights_are_counted_once);
  checks.group("broken", programs_that_are_broken);
  checks.group("others", programs_that_others_run);
  return checks.end();
}
