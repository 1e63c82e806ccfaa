// What must go wrong, and how: `mirror_faults BUNDLES`. Whatever fails says one clear sentence, and the
// text and the engine survive.

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <fstream>
#include <future>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "checks.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "hooked.hpp"
#include "late_stream.hpp"
#include "openvino_settings.hpp"
#include "session_device.hpp"
#include "stand_in_driver.hpp"

namespace {

using namespace mirror;
namespace fs = std::filesystem;

fs::path bundles;
Checks checks;
const Tokens prompt = {1, 2, 3};

// Opens and closes once; waiting gives up after 20 s, so that a broken test ends.
class Gate {
 public:
  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  bool wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [this] { return open_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

std::shared_ptr<Engine> open_engine(const std::string& bundle, EngineOptions options,
                                    std::shared_ptr<Device> target = nullptr, std::shared_ptr<Device> draft = nullptr,
                                    const Tokens& eos = {}) {
  options.threads = 1;
  const fs::path folder = bundles / bundle;
  Manifest manifest = read_manifest(folder);
  if (!eos.empty()) manifest.tokens.eos = eos;
  Placement places;
  places.target = target ? target : open_device("cpu");
  places.suffix = places.target;
  places.draft = draft ? draft : open_device("cpu");
  return std::make_shared<Engine>(folder, std::move(manifest), options, places);
}

EngineOptions in_mode(Mode mode) {
  EngineOptions options;
  options.mode = mode;
  return options;
}

GenerationOptions up_to(std::int64_t tokens) {
  GenerationOptions options;
  options.max_new_tokens = tokens;
  return options;
}

std::unique_ptr<Answer> run(Engine& engine, const Tokens& tokens = prompt, std::int64_t count = 40) {
  auto answer = engine.answer(tokens, up_to(count));
  while (answer->next()) {
  }
  return answer;
}

const Tokens& path() {
  static const Tokens tokens = run(*open_engine("context", in_mode(Mode::plain)))->tokens();
  return tokens;
}

bool begins_path(const Tokens& tokens) {
  return tokens.size() <= path().size() && std::equal(tokens.begin(), tokens.end(), path().begin());
}

// Checks that `work` throws an Error of a kind whose message holds a text.
template <typename Work>
void refused(const std::string& name, ErrorKind kind, const std::string& text, Work work) {
  try {
    work();
    checks.check(false, name + ": nothing was refused");
  } catch (const Error& error) {
    checks.check(error.kind() == kind && std::string(error.what()).find(text) != std::string::npos,
                 name + ": " + error.what());
  }
}

// A hook that acts on the n-th pass of a segment, once.
Hook nth(const std::string& segment, int number, Hook act) {
  auto left = std::make_shared<std::atomic<int>>(number);
  return [=](const std::string& name, const PassFeeds& feeds) {
    if (name == segment && --*left == 0) act(name, feeds);
  };
}

void out_of_luck(const std::string&, const PassFeeds&) { throw std::runtime_error("out of luck"); }

std::shared_ptr<Device> hooked(Hook hook) { return std::make_shared<HookedDevice>(std::move(hook)); }

void draft_that_throws(Mode mode, const std::string& segment, int number) {
  const std::string name = "draft throws " + to_string(mode) + " " + segment + " " + std::to_string(number);
  const auto engine = open_engine("context", in_mode(mode), nullptr, hooked(nth(segment, number, out_of_luck)));
  for (int turn = 0; turn < 2; ++turn) {
    const auto answer = run(*engine);
    checks.equal(answer->tokens(), path(), name);
    checks.check(answer->events().size() == 1 && answer->events()[0].kind == "draft_lost" &&
                     answer->events()[0].message.find("out of luck") != std::string::npos,
                 name + " events");
    checks.check(answer->rounds().back().mode == Mode::plain, name + " goes on in plain mode");
  }
}

void draft_that_hangs(Mode mode, int number) {
  const std::string name = "draft hangs " + to_string(mode) + " " + std::to_string(number);
  auto wake = std::make_shared<Gate>();
  EngineOptions options = in_mode(mode);
  options.draft_timeout_s = 0.2;
  const auto engine =
      open_engine("context", options, nullptr,
                  hooked(nth("draft", number, [wake](const std::string&, const PassFeeds&) { wake->wait(); })));
  const auto answer = run(*engine);
  checks.equal(answer->tokens(), path(), name);
  checks.check(
      answer->events().size() == 1 && answer->events()[0].message.find("no answer within 0.2 s") != std::string::npos,
      name + " events");
  wake->open();
  checks.equal(run(*engine)->tokens(), path(), name + " again");
}

void target_that_fails(Mode mode, const std::string& segment) {
  const std::string name = "target fails " + to_string(mode) + " " + segment;
  EngineOptions options = in_mode(mode);
  options.candidates = CandidateSource::both;  // or the exit head would not run
  const auto engine = open_engine("context", options, hooked(nth(segment, 3, out_of_luck)));
  const auto answer = engine->answer(prompt, up_to(40));
  bool failed = false;
  try {
    while (answer->next()) {
    }
  } catch (const std::runtime_error& error) {
    failed = std::string(error.what()) == "out of luck";
  }
  checks.check(failed && begins_path(answer->tokens()) && answer->finish_reason() == FinishReason::cancelled, name);
  checks.equal(run(*engine)->tokens(), path(), name + " and the engine goes on");
}

void busy_and_freed() {
  auto engine = open_engine("context", {});
  auto first = engine->answer(prompt, up_to(40));
  first->next();
  refused("busy", ErrorKind::busy, "already making an answer", [&] { engine->answer({5, 6}, up_to(3)); });
  while (first->next()) {
  }
  checks.equal(first->tokens(), path(), "the first answer is unharmed");
  checks.equal(run(*engine, {5, 6}, 3)->tokens().size(), std::size_t{3}, "and the engine is free");
  auto half = engine->answer(prompt, up_to(40));
  half->next();
  half.reset();
  checks.equal(run(*engine)->tokens(), path(), "a dropped answer frees the engine");
  auto last = engine->answer(prompt, up_to(40));
  engine->cancel();
  engine.reset();
  checks.check(!last->next() && last->finish_reason() == FinishReason::cancelled, "an answer outlives its engine");
}

void cancelled_in_mid_round(Mode mode) {
  const std::string name = "cancel " + to_string(mode);
  auto reached = std::make_shared<Gate>(), go_on = std::make_shared<Gate>();
  const auto engine =
      open_engine("context", in_mode(mode), hooked(nth("target_suffix", 4, [=](const std::string&, const PassFeeds&) {
                    reached->open();
                    go_on->wait();
                  })));
  std::unique_ptr<Answer> answer;
  std::thread worker([&] { answer = run(*engine); });
  checks.check(reached->wait(), name + " reached");
  engine->cancel();
  go_on->open();
  worker.join();
  // The pass that was paused is the third round's; it was committed, and none after it.
  checks.check(answer->finish_reason() == FinishReason::cancelled && answer->rounds().size() == 3 &&
                   begins_path(answer->tokens()),
               name);
  checks.equal(run(*engine)->tokens(), path(), name + " and the engine goes on");
}

void cancelled_in_prefill() {
  std::weak_ptr<Engine> known;
  const auto engine =
      open_engine("context", {}, hooked(nth("target_suffix", 2, [&known](const std::string&, const PassFeeds&) {
                    if (const auto engine = known.lock()) engine->cancel();
                  })));
  known = engine;
  Tokens long_prompt;
  for (Token token = 0; token < 20; ++token) long_prompt.push_back(token);
  const auto answer = run(*engine, long_prompt);
  checks.check(answer->tokens().empty() && answer->finish_reason() == FinishReason::cancelled,
               "cancel during a long prompt");
  checks.equal(run(*engine)->tokens(), path(), "and the engine goes on");
}

void requests_that_make_no_sense() {
  EngineOptions short_context;
  short_context.max_length = 10;
  const auto engine = open_engine("context", short_context);
  refused("long prompt", ErrorKind::capacity, "prompt has 12 tokens and the cache holds 10",
          [&] { run(*engine, Tokens(12, 1)); });
  checks.equal(run(*engine)->tokens().size(), std::size_t{7}, "a full cache ends the answer");
  refused("no tokens", ErrorKind::request, "no tokens", [&] { run(*engine, {}); });
  refused("unknown token", ErrorKind::request, "token 23; this model's tokens are 0 to 22",
          [&] { run(*engine, {1, 23}); });
  refused("negative token", ErrorKind::request, "token -1", [&] { run(*engine, {-1}); });
  refused("no length", ErrorKind::request, "max_new_tokens is 0", [&] { engine->answer(prompt, up_to(0)); });
  GenerationOptions hot;
  hot.sampling.temperature = -1;
  refused("temperature", ErrorKind::request, "temperature is -1; it must be 0 (greedy) or more",
          [&] { engine->answer(prompt, hot); });
  GenerationOptions stop;
  stop.stop = {"x"};
  refused("text without a tokenizer", ErrorKind::request, "no tokenizer.json", [&] { engine->answer(prompt, stop); });
}

void options_that_can_not_be_served() {
  EngineOptions options;
  options.kappa = 9;
  refused("kappa", ErrorKind::request, "kappa is 9 and the bundle's graphs give 2",
          [&] { open_engine("context", options); });
  options = {};
  options.fanout = std::vector<int>{1, 1};
  refused("fanout", ErrorKind::request, "fanout has 2 counts; with gamma 3 it must have 4",
          [&] { open_engine("context", options); });
  options.fanout = std::vector<int>{0, 0, 0, 0};
  refused("no branch", ErrorKind::request, "one of them above 0", [&] { open_engine("context", options); });
  options = {};
  options.max_length = 1000;
  refused("max_length", ErrorKind::request, "exported for 64", [&] { open_engine("context", options); });
  options = {};
  options.tokens_per_pass = std::vector<int>{2};
  refused("streams", ErrorKind::request, "the draft has 0 streams", [&] { open_engine("context", options); });
  options = {};
  options.proposal_tokens_per_pass = std::vector<int>{1, 2};
  refused("streams of a proposal", ErrorKind::request, "proposal_tokens_per_pass is (1, 2); the draft has 0 streams",
          [&] { open_engine("context", options); });
  options = {};
  options.branches_per_pass = std::vector<int>{2, 3};
  refused("more branches", ErrorKind::request,
          "branches_per_pass is (2, 3); its counts must be 1 or more and never rise",
          [&] { open_engine("context", options); });
  options.branches_per_pass = std::vector<int>{2, 0};
  refused("no branches", ErrorKind::request, "branches_per_pass is (2, 0)", [&] { open_engine("context", options); });
  options = {};
  options.draft_context = 1;
  refused("a draft's context", ErrorKind::request, "draft_context is 1; it must be 2 or more",
          [&] { open_engine("context", options); });
  options.draft_context = 8;
  refused("a fed draft's context", ErrorKind::request,
          "draft_context is 8, and this bundle has no draft that reads a context by itself",
          [&] { open_engine("fed", options); });
  refused("no draft", ErrorKind::request, "mode mirror needs a draft and this bundle has none",
          [&] { open_engine("alone", {}); });
  options = {};
  options.gamma = 60;
  options.fanout = std::vector<int>(61, 2);
  refused("rollout", ErrorKind::request, "takes 7381 rows, and a draft's graphs have room for 4096",
          [&] { open_engine("context", options); });
  const auto plain = open_engine("context", in_mode(Mode::plain));
  GenerationOptions serial;
  serial.mode = Mode::serial;
  refused("plain engine", ErrorKind::request, "without it", [&] { plain->answer(prompt, serial); });
}

void devices_that_are_not_there() {
  refused("device name", ErrorKind::device, "no device is called 'gpu'", [&] { open_device("gpu"); });
  EngineOptions options;
  options.target_device = "cuda:0";
  const auto offered = Ort::GetAvailableProviders();
  if (std::find(offered.begin(), offered.end(), "CUDAExecutionProvider") == offered.end())
    refused("no cuda", ErrorKind::device, "cuda:0 needs CUDAExecutionProvider, this onnxruntime offers",
            [&] { Engine::load(bundles / "context", options); });
  options.target_device = "openvino:NPU";
  refused("no plugin", ErrorKind::device, "openvino:NPU isn't there",
          [&] { Engine::load(bundles / "context", options); });
  refused("no library", ErrorKind::device, "can't be registered",
          [&] { register_provider_library("x", "/no/such/library.so"); });
}

void bundles_that_are_broken() {
  refused("no folder", ErrorKind::bundle, "the folder does not exist", [&] { Engine::load(bundles / "nowhere", {}); });
  const fs::path folder = fs::temp_directory_path() / "mirror-faults-bundle";
  fs::remove_all(folder);
  fs::copy(bundles / "context", folder);
  std::ofstream(folder / "target_suffix.onnx", std::ios::binary) << "not a graph";
  refused("edited", ErrorKind::bundle, "target_suffix.onnx has 11 bytes", [&] { Engine::load(folder, {}); });
  const Manifest manifest = read_manifest(folder);
  Placement places{open_device("cpu"), open_device("cpu"), open_device("cpu")};
  refused("no graph", ErrorKind::device, "cpu can't load target_suffix.onnx",
          [&] { Engine(folder, manifest, {}, places); });
  fs::remove(folder / "target_suffix.onnx");
  refused("missing", ErrorKind::bundle, "target_suffix.onnx is missing from", [&] { Engine::load(folder, {}); });
  fs::copy(bundles / "context" / "target_suffix.onnx", folder);
  EngineOptions hashes;
  hashes.verify_hashes = true;
  checks.equal(run(*Engine::load(folder, hashes))->tokens(), path(), "hashes agree");
  std::fstream file(folder / "target_suffix.onnx", std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(-20, std::ios::end);
  file.put('!');
  file.close();
  refused("same size, other hash", ErrorKind::bundle, "does not have the sha256",
          [&] { Engine::load(folder, hashes); });
  fs::remove_all(folder);
}

// One graph's file then says that it refers to weights that no machine holds.
void asks_for_the_moon(const fs::path& folder) {
  const std::string entry = std::string("\x0a\x06") + "length" + "\x12\x10" + "1000000000000000";  // 10^15
  const auto message = [](char tag, const std::string& content) {
    return std::string{tag, static_cast<char>(content.size())} + content;
  };
  const std::string more = message('\x3a', message('\x2a', message('\x6a', entry)));
  std::ofstream(folder / "draft.onnx", std::ios::binary | std::ios::app) << more;
  auto manifest = nlohmann::json::parse(std::ifstream(folder / "mirror.json"));
  manifest["files"]["draft.onnx"]["bytes"] = fs::file_size(folder / "draft.onnx");
  std::ofstream(folder / "mirror.json") << manifest;
}

void what_does_not_fit() {
  const fs::path folder = fs::temp_directory_path() / "mirror-faults-memory";
  fs::remove_all(folder);
  fs::copy(bundles / "context", folder);
  asks_for_the_moon(folder);
  refused("load", ErrorKind::device, "draft 931322.57 GiB", [&] { Engine::load(folder, {}); });
  checks.check(Engine::load(folder, in_mode(Mode::plain)) != nullptr, "a draft that isn't loaded needs nothing");
  fs::remove_all(folder);

  const Manifest manifest = read_manifest(bundles / "context");
  const auto device = std::make_shared<HookedDevice>();
  const Placement places{device, device, device};
  const auto check = [&](std::uint64_t free) {
    device->free_bytes = free;
    check_room(memory_needs(bundles / "context", manifest, make_plan(manifest, {}, true), places));
  };
  refused("needs", ErrorKind::device, "host memory has 0.00 GiB free, these segments need at least",
          [&] { check(9000); });
  check(std::uint64_t{1} << 30);
  const auto free = host_free_bytes();
  checks.check(!free || (*free > 1 << 20 && *free < std::uint64_t{1} << 50), "this machine tells its memory");
}

// A stream on a part of a GPU, of a part that is made once; none from a driver that lacks a call or refuses it.
void parts_of_a_gpu() {
  StandInDriver gpu;
  CudaDriver driver(gpu.driver());
  for (const int number : {1, 2}) {
    checks.check(driver.part_stream(0, 0.25, -5) != nullptr, "the driver gives a part");
    checks.check(gpu.split_into == 33 && gpu.parts == 1 && gpu.streams == number && gpu.last_priority == -5,
                 "a quarter of 132 multiprocessors, and two urgent streams on it");
  }
  driver.part_stream(0, 0.5, 0);
  checks.check(gpu.split_into == 66 && gpu.parts == 2, "another share is another part");
  for (const char* name : {"cuDeviceGet", "cuDeviceGetDevResource", "cuDevSmResourceSplitByCount",
                           "cuDevResourceGenerateDesc", "cuGreenCtxCreate", "cuGreenCtxStreamCreate"}) {
    CudaDriver old(StandInDriver(name).driver());
    checks.check(old.gpus() == 1 && old.part_stream(0, 0.25, -5) == nullptr, std::string("no part without ") + name);
    const StandInDriver unwilling("", name);
    CudaDriver refusing(unwilling.driver());
    checks.check(refusing.part_stream(0, 0.25, -5) == nullptr, std::string("no part where it refuses ") + name);
  }
  CudaDriver none([](const char*) -> void* { return nullptr; });
  checks.check(none.gpus() == 0 && none.part_stream(0, 0.25, -5) == nullptr && !none.free_bytes(0), "no driver");
}

// A part of a GPU is asked for by name, and no part of its device's own name.
void parts_of_gpus_are_asked_for_by_name() {
  for (const char* name : {"cuda:3", "CUDA:03", "cuda:3:0.25", "cuda:3:.5", "cuda:3:0.125"})
    checks.equal(device_name(name), std::string("cuda:3"), name);
  for (const char* name : {"cuda:0:1", "cuda:0:0", "cuda:0:0.0", "cuda:0:1.5", "cuda:0:half", "cuda:0:-.5", "cuda:0:.1234", "cuda:0:"})
    refused(name, ErrorKind::device, "write a part above 0 and below 1, as in cuda:0:0.25",
            [name] { open_device(name, Role::draft); });
}

// OpenVINO's gated MLP divides by half the number of threads on matrix units, and the process dies of it.
void matrix_units_get_two_threads_or_f32() {
  const CpuFacts one{1, true}, two{2, true}, four{4, true}, plain{1, false};
  const auto precision = [](const char* unit, const char* asked, Role role, const CpuFacts& cpu) {
    return openvino_precision(unit, asked, role, cpu);
  };
  checks.equal(precision("CPU", "", Role::draft, two), std::string(), "a draft's arithmetic is OpenVINO's choice");
  checks.equal(precision("CPU", "", Role::draft, plain), std::string(), "with one CPU too, without matrix units");
  checks.equal(precision("CPU", "", Role::draft, one), std::string("f32"), "but not where they need two threads");
  checks.equal(precision("CPU", "", Role::target, two), std::string("f32"), "a target is exact");
  checks.equal(precision("CPU", "bf16", Role::target, two), std::string("bf16"), "or as asked for");
  checks.equal(precision("GPU.1", "", Role::target, one), std::string("f16"), "a GPU's own arithmetic");
  refused("one CPU", ErrorKind::device, "openvino:CPU:bf16 needs 2 threads on this CPU, which has matrix units, and",
          [&] { precision("CPU", "bf16", Role::draft, one); });
  const auto told = [](const char* precision, int threads, const CpuFacts& cpu) {
    const auto all = nlohmann::json::parse(openvino_settings("CPU", precision, threads, cpu));
    return all["CPU"]["INFERENCE_NUM_THREADS"].get<std::string>() +
           (all["CPU"].contains("ENABLE_HYPER_THREADING") ? "+" : "");
  };
  for (const char* wide : {"", "bf16", "f16"}) {
    checks.equal(told(wide, 1, four), std::string("2"), std::string("two threads for ") + wide);
    checks.equal(told(wide, 1, two), std::string("2+"), std::string("of one core too, for ") + wide);
    checks.equal(told(wide, 3, four), std::string("3"), std::string("or more for ") + wide);
    checks.equal(told(wide, 1, plain), std::string("1"), std::string("without matrix units one for ") + wide);
  }
  checks.equal(told("f32", 1, four), std::string("1"), "one for f32");
  checks.check(openvino_settings("NPU", "f16", 1, two).find("THREAD") == std::string::npos, "none for an NPU");
  checks.check(physical_cores() >= 1 && allowed_cpus() >= physical_cores(), "this machine tells its CPUs");
}

// Sampled, with a penalty, so that whole rows of logits are needed.
Tokens drawn(Engine& engine, const Tokens& tokens) {
  GenerationOptions options = up_to(20);
  options.sampling.temperature = 1.0;
  options.sampling.repetition_penalty = 1.2;
  options.sampling.seed = 11;
  const auto answer = engine.answer(tokens, options);
  while (answer->next()) {
  }
  return answer->tokens();
}

// The plain path of six bundles, in every mode on two devices that are made anew each time.
template <typename MakeTarget, typename MakeDraft>
void every_mode(const std::string& name, MakeTarget target, MakeDraft draft) {
  for (const std::string bundle : {"context", "wide", "perfect", "streams", "fed", "tuned"})
    for (const Mode mode : {Mode::plain, Mode::serial, Mode::mirror}) {
      EngineOptions options = in_mode(mode);
      options.pinned = mode != Mode::serial;
      if (bundle == "streams") options.tokens_per_pass = std::vector<int>{3};
      if (bundle == "wide") options.branches_per_pass = std::vector<int>{17, 8, 3};
      if (bundle == "perfect") options.branches_per_pass = std::vector<int>{12, 8, 2};
      if (bundle == "tuned" && mode == Mode::serial) options.proposal_tokens_per_pass = std::vector<int>{2, 1};
      const std::string what = name + " " + bundle + " " + to_string(mode);
      const Tokens start = {4, 5, 6, 7, 8, 9, 1};
      const auto plain = open_engine(bundle, in_mode(Mode::plain)),
                 engine = open_engine(bundle, options, target(), draft());
      const auto answer = run(*engine, start);
      checks.equal(answer->tokens(), run(*plain, start)->tokens(), what);
      checks.check(answer->events().empty(),
                   what + (answer->events().empty() ? "" : ": " + answer->events()[0].message));
      if (bundle == "perfect" && mode != Mode::plain)
        checks.equal(answer->statistics().acceptance_rate.value_or(0), 1.0, name + " perfect draft");
      checks.equal(drawn(*engine, start), drawn(*plain, start), what + " drawn");
    }
}

// Every form and both kinds of widths give the plain path, and a perfect draft stays perfect where
// passes are padded, so no real row sees a padding row. So do sessions that bind nothing.
void forms_and_widths(Form form, bool fixed, bool binds) {
  const std::string name = to_string(form) + (fixed ? " fixed" : " free") + (binds ? "" : " unbound");
  const auto device = [&] {
    auto made = std::make_shared<HookedDevice>(nullptr, form, fixed);
    made->binds = binds;
    return made;
  };
  every_mode(name, device, device);
}

// A draft alone, of windows of 4 tokens; an outcome that is given is decided during its rollout's second pass.
struct LoneDraft {
  LoneDraft(const std::string& bundle, std::vector<int> branches_per_pass, std::shared_ptr<DeviceStream> stream,
            bool fixed_widths) {
    EngineOptions options;
    options.candidates = CandidateSource::draft;
    if (!branches_per_pass.empty()) options.branches_per_pass = std::move(branches_per_pass);
    options.threads = 1;
    const Manifest manifest = read_manifest(bundles / bundle);
    const Plan plan = make_plan(manifest, options, true);
    const auto look = [this](const std::string& segment, const PassFeeds& feeds) {
      if (segment != "draft") return;
      widths.insert(feeds.width);
      if (++passes == 2 && outcome) meeting->decide(*outcome);
    };
    HookedDevice device(look, Form::inplace, fixed_widths);
    device.stream = std::move(stream);
    draft = load_draft(bundles / bundle, manifest, plan, device);
  }

  Rollout roll_out(const std::optional<Outcome>& decided) {
    const Tokens context = {1, 2, 3, 4, 5, 6, 7};
    Proposal proposal = draft->propose(context, 4, std::nullopt);
    if (!proposal.coming.empty()) proposal.read();
    Tokens window = proposal.tokens;
    window.insert(window.begin(), context.back());
    meeting = std::make_unique<Meeting>();
    outcome = decided;
    passes = 0;
    return draft->roll_out(context, window, 4, *meeting, std::nullopt);
  }

  std::unique_ptr<Draft> draft;
  std::unique_ptr<Meeting> meeting;
  std::optional<Outcome> outcome;
  std::set<int> widths;
  int passes = 0;
};

// Once the outcome is known, the branch that it takes goes on alone, if it took part so far: limits or not, and where
// the passes' tokens are on the device alone, too.
void taken_branch_goes_on_alone(bool launched, const std::vector<int>& limits) {
  const std::string name = std::string("taken") + (launched ? " launched" : "") + (limits.size() > 1 ? " of few" : "");
  const auto stream = [launched] { return launched ? std::make_shared<LateStream>() : nullptr; };
  const Rollout whole = LoneDraft("wide", {}, stream(), false).roll_out({});
  LoneDraft draft("wide", limits, stream(), false);
  const Rollout undecided = draft.roll_out({});
  checks.check(whole.branches.size() == 25 && undecided.branches.size() == static_cast<std::size_t>(limits[0]),
               name + ": branches");
  checks.check(std::none_of(undecided.spans.begin(), undecided.spans.end(),
                            [](const Span& span) { return span.name == SpanName::propose; }),
               name + ": a proposal's time is told with it");
  for (const Branch& taken : undecided.branches) {
    const Rollout found = draft.roll_out(Outcome{taken.accepted, taken.next});
    for (std::size_t row = 0; row < found.branches.size(); ++row) {
      const Branch& branch = found.branches[row];
      const int same = find_branch(whole.branches, {branch.accepted, branch.next});
      const Tokens& all = whole.continuations.at(static_cast<std::size_t>(same));
      const bool is_taken = branch.accepted == taken.accepted && branch.next == taken.next;
      const std::ptrdiff_t length = undecided.continuations[row].size() < 2 ? 1 : is_taken ? 4 : 2;
      checks.equal(found.continuations[row], Tokens(all.begin(), all.begin() + length), name);
    }
  }
}

// A device that takes few widths has those of the branches that take part, six here, and of a proposal's passes, three.
void passes_have_widths_of_their_own() {
  LoneDraft draft("tuned", {}, nullptr, true);
  checks.equal(draft.roll_out({}).branches.size(), std::size_t{6}, "six branches take part");
  std::string found;
  for (const int width : draft.widths) found += " " + std::to_string(width);
  draft.widths.erase(1);  // of a context's odd row
  checks.check(draft.widths == std::set<int>{3, 6}, "widths of a draft's passes:" + found);
}

// Passes that are only launched, and read when someone waits for them, give the plain path too: recorded ones, those
// that are fed from another device, and rows that are drawn from or asked for their likeliest token.
void passes_that_are_launched() {
  std::vector<std::shared_ptr<LateStream>> streams;
  const auto launched = [&] {
    auto made = std::make_shared<HookedDevice>(nullptr, Form::inplace, true);
    streams.push_back(std::make_shared<LateStream>());
    made->stream = streams.back();
    return made;
  };
  const auto waited = [] { return std::make_shared<HookedDevice>(); };
  every_mode("launched", launched, launched);
  every_mode("launched target", launched, waited);
  every_mode("launched draft", waited, launched);
  int recorded = 0, replayed = 0, spreads = 0, followed = 0;
  for (const auto& stream : streams) {
    recorded += stream->recorded;
    replayed += stream->replayed;
    spreads += stream->spreads;
    followed += stream->followed;
    checks.check(!stream->spoilt, "what a pass was given stays until it has been copied");
  }
  checks.check(recorded > 50 && replayed > 3 * recorded, "passes are recorded once and replayed");
  checks.check(spreads > 100, "a rollout's passes follow each other on the device");
  checks.check(followed > 20, "a target's pass follows a proposal that nobody has read");
}

// A device whose passes are launched.
std::shared_ptr<HookedDevice> on_stream(std::shared_ptr<LateStream> stream, Hook hook = nullptr, bool fixed = true) {
  auto made = std::make_shared<HookedDevice>(std::move(hook), Form::inplace, fixed);
  made->stream = std::move(stream);
  return made;
}

// A draft whose device fails behind what it launched is left out, and the answer goes on.
void proposal_that_never_comes() {
  const auto stream = std::make_shared<LateStream>();
  // While the target's pass over the first window begins, whose tokens the draft is making still.
  const Hook hook = nth("target_prefix", 2, [stream](const std::string&, const PassFeeds&) { stream->broken = true; });
  const auto engine =
      open_engine("context", in_mode(Mode::serial), on_stream(std::make_shared<LateStream>(), hook), on_stream(stream));
  const auto answer = run(*engine);
  checks.equal(answer->tokens(), path(), "a proposal that never comes");
  const auto events = answer->events();
  checks.check(events.size() == 1 && events[0].kind == "draft_lost" &&
                   events[0].message.find("out of luck") != std::string::npos,
               "is told of");
}

// The next round begins before a round's tokens are handed out, where that only launches. What can't begin is told in
// its turn, and one that was begun for an answer that nobody goes on with is nobody's.
void next_round_before_tokens_are_handed_out(Mode mode) {
  const std::string name = "early " + to_string(mode);
  int passes = 0, failing = -1;
  const auto look = [&](const std::string& segment, const PassFeeds& feeds) {
    if (segment == "target_prefix" && ++passes == failing) out_of_luck(segment, feeds);
  };
  const auto engine = open_engine("context", in_mode(mode), on_stream(std::make_shared<LateStream>(), look),
                                  on_stream(std::make_shared<LateStream>()));
  {
    const auto answer = engine->answer(prompt, up_to(40));
    // The prompt's pass is the first, and a draft has to show once that it only launches.
    for (const int expected : {1, 3, 4, 5}) {
      answer->next();
      checks.equal(passes, expected, name + ": passes begun");
    }
  }
  checks.equal(run(*engine)->tokens(), path(), name + ": an answer after one that was left");
  passes = 0;
  failing = 4;
  const auto answer = engine->answer(prompt, up_to(40));
  std::string said;
  int handed = 0;
  try {
    while (answer->next()) ++handed;
  } catch (const std::runtime_error& error) {
    said = error.what();
  }
  checks.check(said == "out of luck" && handed == 3, name + ": the round that can't begin fails in its turn");
  checks.check(begins_path(answer->tokens()), name + ": after the tokens before it");
}

// In plain mode a pass is launched before the last one's token is read, and none after the answer's last.
void next_pass_before_its_token_is_read(bool pinned, bool hurries, bool fixed) {
  const std::string name = std::string("ahead") + (pinned ? " pinned" : "") + (hurries ? " hurrying" : "");
  const auto stream = std::make_shared<LateStream>(hurries);
  std::atomic<int> passes{0};
  const auto count = [&passes](const std::string& segment, const PassFeeds&) { passes += segment == "target_suffix"; };
  EngineOptions options = in_mode(Mode::plain);
  options.pinned = pinned;
  const auto engine = open_engine("context", options, on_stream(stream, count, fixed));
  for (int turn = 1; turn <= 2; ++turn) {
    checks.equal(run(*engine)->tokens(), path(), name);
    // The first token is the prompt's, whose pass none follows; nor does one follow that of the last.
    checks.equal(stream->spreads.load(), turn * 38, name + ": passes over tokens that are on the device");
    // On a stream that hurries they have come to the host all the same, though nobody asked for them.
    if (!hurries) checks.equal(stream->unread.load(), turn * 38, name + ": and have not come to the host");
    checks.equal(passes.load(), turn * 40, name + ": a pass for each token");
  }
  const int before = stream->spreads;
  for (const std::int64_t tokens : {1, 2})
    checks.check(begins_path(run(*engine, prompt, tokens)->tokens()), name + " short");
  drawn(*engine, prompt);
  checks.equal(stream->spreads.load(), before, name + ": none where no pass follows, or a draw needs its logits");
  checks.check(!stream->spoilt, name + ": what a pass was given stays until it has been copied");
}

enum class Ending { at_eos, cancelled, dropped, failed };

// Makes an answer in plain mode that ends while the next pass is under way.
Tokens end_early(Engine& engine, Ending ending) {
  GenerationOptions options = up_to(40);
  options.mode = Mode::plain;
  const auto answer = engine.answer(prompt, options);
  try {
    for (int count = 0; answer->next(); ++count) {
      if (count == 5 && ending == Ending::dropped) break;
      if (count == 5 && ending == Ending::cancelled) engine.cancel();
    }
  } catch (const std::runtime_error& error) {
    checks.check(ending == Ending::failed && std::string(error.what()) == "out of luck", error.what());
  }
  return answer->tokens();
}

// The token of the path that is the last to come up.
Token latest_token() {
  auto latest = path().begin();
  for (auto at = path().begin(); at != path().end(); ++at)
    if (std::find(path().begin(), at, *at) == at) latest = at;
  return *latest;
}

// What was launched too far when an answer ended is nobody's: not of an answer to this prompt or another, in plain or
// in mirror mode, greedy or drawn, or of one that goes on from the same cache.
void answers_that_leave_a_pass(Ending ending, const std::string& segment, bool hurries) {
  const std::string name = "left " + std::to_string(static_cast<int>(ending)) + " " + segment;
  const Tokens eos = ending == Ending::at_eos ? Tokens{latest_token()} : Tokens{};
  const auto plain = open_engine("context", in_mode(Mode::plain), nullptr, nullptr, eos);
  const auto follow = [&](const std::string& what, const Tokens& other, Mode mode, bool sampled, bool reuse) {
    const Hook hook = ending == Ending::failed ? nth(segment, 5, out_of_luck) : nullptr;
    const auto stream = std::make_shared<LateStream>(hurries);
    const auto engine = open_engine("context", in_mode(Mode::mirror), on_stream(stream, hook), nullptr, eos);
    const Tokens left = end_early(*engine, ending);
    checks.check(begins_path(left) && left.size() >= 3 && left.size() < 40, name + ": ended early");
    checks.check(stream->spreads > 0, name + ": with a pass under way");
    Tokens start = other;
    if (reuse) start.insert(start.begin() + static_cast<std::ptrdiff_t>(prompt.size()), left.begin(), left.end());
    GenerationOptions options = up_to(15);
    options.mode = mode;
    options.reuse_cache = reuse;
    const auto answer = engine->answer(start, options);
    while (answer->next()) {
    }
    checks.equal(answer->tokens(), run(*plain, start, 15)->tokens(), name + ", " + what);
    if (reuse) checks.check(answer->statistics().reused_prompt_tokens >= 5, name + " reuses");
    if (sampled) checks.equal(drawn(*engine, start), drawn(*plain, start), name + ", " + what + " drawn");
    checks.check(!stream->spoilt, name + ": what a pass was given stays until it has been copied");
  };
  follow("the same", prompt, Mode::plain, true, false);
  follow("one token", {7}, Mode::plain, false, false);
  follow("mirrored", {4, 5, 6, 7, 8, 9, 1}, Mode::mirror, true, false);
  follow("a conversation", {1, 2, 3, 5}, Mode::plain, false, true);
  follow("a mirrored conversation", {1, 2, 3, 5}, Mode::mirror, false, true);
}

// A graph that names no token says that it found no number, and there are no logits to look at any more.
void launched_passes_without_numbers() {
  const auto device = on_stream(std::make_shared<LateStream>());
  device->sends_none = true;
  refused("no number", ErrorKind::device, "greatest logit is no finite number",
          [&] { run(*open_engine("context", in_mode(Mode::plain), device)); });
}

// The suffix on another device than the prefix, either of them launched.
void segments_apart(bool prefix_launched, bool suffix_launched) {
  const std::string name =
      std::string("apart") + (prefix_launched ? " launched" : "") + (suffix_launched ? " to launched" : "");
  for (const std::string bundle : {"context", "fed"}) {
    const fs::path folder = bundles / bundle;
    Placement places;
    const auto part = [](bool launched) {
      auto made = std::make_shared<HookedDevice>();
      if (launched) made->stream = std::make_shared<LateStream>();
      return made;
    };
    places.target = part(prefix_launched);
    places.suffix = part(suffix_launched);
    places.draft = part(false);
    const auto engine = std::make_shared<Engine>(folder, read_manifest(folder), EngineOptions{}, places);
    checks.equal(run(*engine)->tokens(), run(*open_engine(bundle, in_mode(Mode::plain)))->tokens(),
                 name + " " + bundle);
  }
}

// A draft's thread opens a session for a shape that nobody had asked for before; its device has gone by then.
void segment_that_outlives_its_device() {
  const auto owned = std::make_shared<std::string>("configured");
  std::unique_ptr<Segment> segment;
  {
    Provider provider;
    provider.name = "CPUExecutionProvider";
    provider.form = Form::rows;
    provider.compiles = true;
    provider.device = "a device with a name that is too long to be kept inside its object";
    const auto name_it = [owned](Ort::SessionOptions& options, const SegmentFacts&, int, int) {
      options.SetLogId(owned->c_str());
    };
    const auto device = std::make_shared<SessionDevice>(provider, name_it);
    const Manifest manifest = read_manifest(bundles / "context");
    segment = device->load_segment(bundles / "context", manifest.segment("draft"), 64, {{1, 1}}, {{2, 2}}, 1);
  }
  PassFeeds feeds(2, 64, std::make_shared<std::vector<std::int32_t>>(64, no_branch));
  const Token tokens[] = {1, 2};
  feeds.fill_causal(tokens, 2, 0);
  feeds.want_rows(0, 2);
  const auto pass = segment->bind(feeds, 2, segment->make_cache());
  pass->run(0);
  checks.check(pass->outputs().token_ids[1] >= 0, "a segment outlives its device");
}

// The suffix and the draft's rollout wait for each other inside their runs: a serial engine would stand still.
void really_overlaps() {
  auto suffix_runs = std::make_shared<Gate>(), draft_runs = std::make_shared<Gate>();
  std::atomic<int> met{0};
  const auto target = hooked(nth("target_suffix", 2, [=, &met](const std::string&, const PassFeeds&) {
    suffix_runs->open();
    met += draft_runs->wait();
  }));
  // The first pass of "draft" reads the prompt, the second one proposes; the rollout's come after those.
  const auto draft = hooked(nth("draft", 5, [=, &met](const std::string&, const PassFeeds&) {
    draft_runs->open();
    met += suffix_runs->wait();
  }));
  const auto engine = open_engine("context", {}, target, draft);
  checks.equal(run(*engine)->tokens(), path(), "overlap: tokens");
  checks.equal(met.load(), 2, "suffix and rollout met inside their runs");
}

void reuses_the_cache() {
  const auto engine = open_engine("context", {});
  Tokens longer = prompt;
  const auto first = run(*engine);
  longer.insert(longer.end(), first->tokens().begin(), first->tokens().end());
  longer.push_back(5);
  GenerationOptions options = up_to(15);
  options.reuse_cache = true;
  auto second = engine->answer(longer, options);
  while (second->next()) {
  }
  checks.equal(second->tokens(), run(*open_engine("context", in_mode(Mode::plain)), longer, 15)->tokens(),
               "a reused cache gives the same text");
  // All but the last token of the first answer, which no pass has read.
  checks.equal(second->statistics().reused_prompt_tokens, 42, "and runs only what is new");
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: mirror_faults BUNDLES\n");
    return 2;
  }
  bundles = arguments[1];
  for (const int number : {1, 2, 5}) {
    checks.group("serial draft", [&] { draft_that_throws(Mode::serial, "draft", number); });
    checks.group("mirror draft", [&] { draft_that_throws(Mode::mirror, "draft", number); });
    checks.group("mirror trunk", [&] { draft_that_throws(Mode::mirror, "draft_trunk", number); });
  }
  for (const Mode mode : {Mode::serial, Mode::mirror})
    for (const int number : {1, 4}) checks.group("hang", [&] { draft_that_hangs(mode, number); });
  for (const Mode mode : {Mode::plain, Mode::serial, Mode::mirror}) {
    for (const char* segment : {"target_prefix", "target_suffix"})
      checks.group("target", [&] { target_that_fails(mode, segment); });
    checks.group("cancel", [&] { cancelled_in_mid_round(mode); });
  }
  checks.group("exit head", [] { target_that_fails(Mode::mirror, "exit_head"); });
  checks.group("busy", busy_and_freed);
  checks.group("prefill", cancelled_in_prefill);
  checks.group("requests", requests_that_make_no_sense);
  checks.group("options", options_that_can_not_be_served);
  checks.group("devices", devices_that_are_not_there);
  checks.group("bundles", bundles_that_are_broken);
  for (const Form form : {Form::inplace, Form::rows})
    for (const bool fixed : {false, true}) checks.group("forms", [&] { forms_and_widths(form, fixed, true); });
  checks.group("unbound", [] { forms_and_widths(Form::rows, true, false); });
  for (const bool launched : {false, true})
    for (const auto& limits : {std::vector<int>{25}, std::vector<int>{20, 12, 5}})
      checks.group("taken", [&] { taken_branch_goes_on_alone(launched, limits); });
  checks.group("widths", passes_have_widths_of_their_own);
  checks.group("launched", passes_that_are_launched);
  checks.group("never comes", proposal_that_never_comes);
  for (const Mode mode : {Mode::serial, Mode::mirror})
    checks.group("early", [mode] { next_round_before_tokens_are_handed_out(mode); });
  for (const bool hurries : {false, true}) {
    for (const bool pinned : {false, true})
      for (const bool fixed : {false, true})
        checks.group("ahead", [&] { next_pass_before_its_token_is_read(pinned, hurries, fixed); });
    for (const Ending ending : {Ending::at_eos, Ending::cancelled, Ending::dropped})
      checks.group("left", [&] { answers_that_leave_a_pass(ending, "", hurries); });
    for (const char* segment : {"target_prefix", "target_suffix"})
      checks.group("left", [&] { answers_that_leave_a_pass(Ending::failed, segment, hurries); });
  }
  checks.group("no number", launched_passes_without_numbers);
  for (const bool launched : {false, true})
    for (const bool other : {false, true}) checks.group("apart", [&] { segments_apart(launched, other); });
  checks.group("lifetimes", segment_that_outlives_its_device);
  checks.group("memory", what_does_not_fit);
  checks.group("parts", parts_of_a_gpu);
  checks.group("parts", parts_of_gpus_are_asked_for_by_name);
  checks.group("matrix units", matrix_units_get_two_threads_or_f32);
  checks.group("overlap", really_overlaps);
  checks.group("reuse", reuses_the_cache);
  return checks.end();
}
