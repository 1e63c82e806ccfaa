// The vectors that all hosts share: `mirror_vectors VECTORS BUNDLES`. BUNDLES is what
// `python -m tests.vectors.generate --bundles` wrote.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "candidates.hpp"
#include "chat.hpp"
#include "checks.hpp"
#include "engine.hpp"
#include "error.hpp"
#include "lookahead.hpp"
#include "pace.hpp"
#include "kernels/noise.hpp"
#include "stopping.hpp"

namespace {

using namespace mirror;
namespace fs = std::filesystem;
using Json = nlohmann::json;

Json read(const fs::path& path) { return Json::parse(std::ifstream(path)); }

SamplingParams sampling_of(const Json& from) {
  return {from["temperature"],
          from["top_k"],
          from["top_p"],
          from["min_p"],
          from["repetition_penalty"],
          std::stoull(from["seed"].get<std::string>())};
}

void check_noise(Checks& checks, const Json& noise) {
  for (const Json& item : noise["philox"]) {
    const Words counter = {item["counter"][0], item["counter"][1], item["counter"][2], item["counter"][3]};
    const Words expected = {item["words"][0], item["words"][1], item["words"][2], item["words"][3]};
    checks.equal(philox(counter, item["key"][0], item["key"][1]), expected, "philox " + item.dump());
  }
  for (const Json& item : noise["uniforms"]) {
    const double found = uniform(std::stoull(item["seed"].get<std::string>()), item["position"], item["token"]);
    checks.equal(found, item["uniform"].get<double>(), "uniform " + item.dump());
    const double expected = item["gumbel"];
    checks.check(std::abs(gumbel(found) - expected) < 1e-9, "gumbel " + item.dump());
  }
}

std::vector<float> logits_of(const Json& from) {
  std::vector<float> logits;
  if (from.contains("values")) {
    for (const Json& value : from["values"]) logits.push_back(value.is_null() ? -INFINITY : value.get<float>());
    return logits;
  }
  const double spread = from["spread"];
  for (std::uint32_t token = 0; token < from["vocab"].get<std::uint32_t>(); ++token)
    logits.push_back(static_cast<float>(spread * (2.0 * uniform(from["seed"], 0, token) - 1.0)));
  return logits;
}

// Against the definition, at every length and with NaN anywhere: the greatest is found in blocks of vectors.
void check_argmax(Checks& checks) {
  std::vector<float> values;
  for (int count = 1; count < 3000; count = count * 5 / 4 + 1) {
    values.clear();
    for (int index = 0; index < count; ++index)
      values.push_back(static_cast<float>(
          std::floor(9 * uniform(1, static_cast<std::uint64_t>(count), static_cast<std::uint32_t>(index)))));
    const auto greatest = static_cast<int>(std::max_element(values.begin(), values.end()) - values.begin());
    checks.equal(argmax(values.data(), count), greatest, "argmax of " + std::to_string(count));
    for (const int place : {0, count / 2, count - 1}) {
      const float before = std::exchange(values[static_cast<std::size_t>(place)], NAN);
      checks.equal(argmax(values.data(), count), place, "argmax with NaN at " + std::to_string(place));
      values[static_cast<std::size_t>(place)] = before;
    }
  }
  std::fill(values.begin(), values.end(), -INFINITY);
  checks.equal(argmax(values.data(), static_cast<int>(values.size())), 0, "argmax of nothing finite");
}

void check_sampling(Checks& checks, const Json& cases) {
  for (const Json& item : cases) {
    const std::vector<float> logits = logits_of(item["logits"]);
    Sampler sampler(sampling_of(item["sampling"]), static_cast<int>(logits.size()), item["context"].get<Tokens>());
    for (std::size_t at = 0; at < item["positions"].size(); ++at)
      checks.equal(sampler.choose(logits.data(), item["positions"][at]), item["tokens"][at].get<Token>(),
                   "sampling " + item.dump());
  }
}

Candidates candidates_of(const Json& rows) {
  Candidates found;
  for (const Json& row : rows) {
    found.top = static_cast<int>(row.size());
    for (const Json& id : row) found.ids.push_back(id);
  }
  return found;
}

// A list of counts; nothing where it is null.
std::optional<std::vector<int>> counts_of(const Json& list) {
  if (list.is_null()) return std::nullopt;
  return list.get<std::vector<int>>();
}

Json pairs_of(const std::vector<Branch>& branches) {
  Json pairs = Json::array();
  for (const Branch& branch : branches) pairs.push_back({branch.accepted, branch.next});
  return pairs;
}

void check_branches(Checks& checks, const Json& item) {
  std::vector<Candidates> sources;
  for (const Json& rows : item["sources"]) sources.push_back(candidates_of(rows));
  const Json found =
      pairs_of(choose_branches(item["window"].get<Tokens>(), sources, item["fanout"].get<std::vector<int>>()));
  checks.equal(found, item["branches"], "branches " + item.dump() + " gave " + found.dump());
}

void check_likelihood(Checks& checks, const Json& item) {
  const auto fanout = item["fanout"].get<std::vector<int>>();
  std::vector<Branch> branches;
  for (const Json& pair : item["branches"]) branches.push_back({pair[0], pair[1]});
  const Json order = by_likelihood(branches, fanout);
  checks.equal(order, item["order"], "likelihood " + item.dump() + " gave " + order.dump());
  const Json kept = pairs_of(likeliest(branches, fanout, item["count"]));
  checks.equal(kept, item["kept"], "likeliest " + item.dump() + " gave " + kept.dump());
}

void check_capacity(Checks& checks, const Json& item) {
  const int slots = rollout_capacity(item["max_length"], item["gamma"], item["branches"],
                                     item["tokens_per_pass"].get<std::vector<int>>(),
                                     item["branches_per_pass"].get<std::vector<int>>(), item["most_given"]);
  checks.equal(slots, item["slots"].get<int>(), "capacity " + item.dump() + " gave " + std::to_string(slots));
}

void check_noise_order(Checks& checks, const Json& item) {
  Candidates candidates = candidates_of(item["ids"]);
  for (const Json& row : item["logprobs"])
    for (const Json& value : row) candidates.logprobs.push_back(value);
  CoupledNoise{std::stoull(item["seed"].get<std::string>()), item["temperature"]}.order(
      candidates, item["positions"].get<std::vector<std::int64_t>>());
  checks.equal(candidates.ids, candidates_of(item["ordered"]).ids, "noise_order");
}

void check_rounds(Checks& checks, const Json& rounds) {
  for (const Json& item : rounds["branches"]) check_branches(checks, item);
  for (const Json& item : rounds["likelihoods"]) check_likelihood(checks, item);
  for (const Json& item : rounds["capacities"]) check_capacity(checks, item);
  check_noise_order(checks, rounds["noise_order"]);
  for (const Json& item : rounds["verify"]) {
    const Outcome outcome = verify(item["window"].get<Tokens>(), [&](int row) {
      return item["choices"][static_cast<std::size_t>(row)].get<Token>();
    });
    checks.check(outcome.accepted == item["accepted"] && outcome.next == item["next"], "verify " + item.dump());
  }
  for (const Json& item : rounds["paces"]) {
    const int branches = item["branches"];
    BranchPace pace(branches);
    Json taken = Json::array();
    for (const Json& end : item["ends"]) {
      pace.note(end[0], end[1]);
      const int first = pace.first(branches);
      taken.push_back({first});
      for (std::size_t number = 0; number < 4; ++number) taken.back().push_back(pace.later(number, first));
    }
    checks.equal(taken, item["taken"], "a pace of " + item["branches"].dump());
  }
  for (const Json& item : rounds["passes"]) {
    Json found = Json::array();
    for (const BranchPass& pass : branch_passes(item["tokens_per_pass"].get<std::vector<int>>(), item["depth"]))
      found.push_back({pass.real, pass.gives});
    checks.equal(found, item["passes"], "passes " + item.dump());
  }
  for (const Json& item : rounds["chunks"]) {
    const Chunk chunk = chunk_width(item["widths"].get<std::vector<int>>(), item["rows"], item["room"]);
    checks.equal(Json({chunk.rows, chunk.width}), item["taken"], "chunk " + item.dump());
  }
  for (const Json& item : rounds["endings"]) {
    Tokens tokens = item["tokens"];
    const auto reason = Stopping(item["eos"].get<Tokens>(), item["limit"], nullptr).cut(tokens);
    const Json found = !reason ? Json() : Json(*reason == FinishReason::stop ? "stop" : "length");
    checks.check(tokens == item["kept"].get<Tokens>() && found == item["reason"], "ending " + item.dump());
  }
}

std::string refusal(const fs::path& folder) {
  try {
    check_files(folder, read_manifest(folder), false);
    return {};
  } catch (const Error& error) {
    return error.what();
  }
}

void check_manifests(Checks& checks, const Json& manifests) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  const fs::path folder = fs::temp_directory_path() / ("mirror-vectors-" + std::to_string(now));
  fs::create_directories(folder);
  std::ofstream(folder / manifests["file"]["name"].get<std::string>())
      << manifests["file"]["content"].get<std::string>();
  for (const Json& item : manifests["cases"]) {
    std::string text = manifests["manifest"], from = item["from"], to = item["to"];
    text.replace(text.find(from), from.size(), to);
    std::ofstream(folder / "mirror.json", std::ios::binary) << text;
    const std::string found = refusal(folder), name = item["name"].get<std::string>() + ": " + found;
    if (item["error"].is_null())
      checks.check(found.empty(), "manifest " + name);
    else
      checks.check(found.find(item["error"].get<std::string>()) != std::string::npos, "manifest " + name);
  }
  fs::remove_all(folder);
}

Json rounds_of(const Answer& answer) {
  Json rounds = Json::array();
  for (const Round& round : answer.rounds())
    rounds.push_back(
        {round.proposed, round.accepted, round.committed, round.reused ? Json(*round.reused) : Json(), round.branches});
  return rounds;
}

void check_generation(Checks& checks, Engine& engine, const Json& item, const std::string& mode) {
  GenerationOptions options;
  options.max_new_tokens = item["max_new_tokens"];
  options.sampling = sampling_of(item["sampling"]);
  options.mode = parse_mode(mode);
  const auto answer = engine.answer(item["prompt"].get<Tokens>(), options);
  Tokens pieces;
  while (const auto piece = answer->next()) pieces.insert(pieces.end(), piece->tokens.begin(), piece->tokens.end());
  const std::string name = "generation " + mode + " " + item.dump();
  checks.equal(pieces, item["tokens"].get<Tokens>(), name + " pieces");
  checks.equal(answer->tokens(), item["tokens"].get<Tokens>(), name + " tokens");
  checks.equal(answer->finish_reason() == FinishReason::stop ? "stop" : "length",
               item["finish_reason"].get<std::string>(), name);
  if (engine.plan.source == CandidateSource::both)
    checks.equal(rounds_of(*answer), item["rounds"][mode], name + " rounds " + rounds_of(*answer).dump());
  checks.check(answer->events().empty(), name + (answer->events().empty() ? "" : ": " + answer->events()[0].message));
}

// The options of a draft's passes.
EngineOptions passes_of(const Json& item) {
  EngineOptions options;
  options.threads = 1;
  options.tokens_per_pass = counts_of(item["tokens_per_pass"]);
  options.branches_per_pass = counts_of(item["branches_per_pass"]);
  options.proposal_tokens_per_pass = counts_of(item["proposal_tokens_per_pass"]);
  return options;
}

void check_generations(Checks& checks, const Json& cases, const fs::path& bundles) {
  for (const Json& item : cases)
    for (const CandidateSource source : {CandidateSource::both, CandidateSource::exit, CandidateSource::draft}) {
      EngineOptions options = passes_of(item);
      options.mode = parse_mode(item["modes"].back());
      options.candidates = source;
      if (!item["draft_context"].is_null()) options.draft_context = item["draft_context"].get<int>();
      const auto engine = Engine::load(bundles / item["bundle"].get<std::string>(), options);
      for (const Json& mode : item["modes"]) check_generation(checks, *engine, item, mode);
    }
}

// float32 [count, 4]: (p % 5 + 1, 3 * p % 7, 0, 0) at position p, as the generator has it.
States exit_states(int first, int count) {
  std::vector<float> values;
  for (int position = first; position < first + count; ++position)
    values.insert(values.end(),
                  {static_cast<float>(position % 5 + 1), static_cast<float>(3 * position % 7), 0.0f, 0.0f});
  const auto* data = reinterpret_cast<const std::byte*>(values.data());
  return {std::vector<std::byte>(data, data + values.size() * sizeof(float)), count};
}

void check_turn(Checks& checks, Draft& draft, int gamma, const Json& turn, const std::optional<CoupledNoise>& noise) {
  const auto context = turn["context"].get<Tokens>();
  const int before_last = static_cast<int>(context.size()) - 1;
  draft.keep(3);
  draft.see_states(0, exit_states(0, before_last));
  const Tokens proposed = draft.propose(context, gamma, noise).tokens;
  checks.equal(proposed, turn["proposed"].get<Tokens>(), "proposed " + turn.dump() + " gave " + Json(proposed).dump());
  Tokens window = {context.back()};
  window.insert(window.end(), proposed.begin(), proposed.end());
  const auto check_rollout = [&](const std::optional<Outcome>& outcome, const Json& expected) {
    Meeting meeting;
    meeting.state(exit_states(before_last, static_cast<int>(window.size())));
    if (outcome) meeting.decide(*outcome);
    const Rollout rollout = draft.roll_out(context, window, gamma, meeting, noise);
    const Json branches = pairs_of(rollout.branches), continuations = rollout.continuations;
    checks.equal(branches, turn["branches"], "branches " + turn.dump() + " gave " + branches.dump());
    checks.equal(continuations, expected, "continuations " + turn.dump() + " gave " + continuations.dump());
  };
  check_rollout({}, turn["continuations"]);
  const Json& decided = turn["decided"];
  if (!decided.is_null())
    check_rollout(Outcome{decided["outcome"][0], decided["outcome"][1]}, decided["continuations"]);
}

void check_draft(Checks& checks, const Json& item, const fs::path& folder) {
  EngineOptions options = passes_of(item);
  options.candidates = CandidateSource::draft;
  options.fanout = counts_of(item["fanout"]);
  const Manifest manifest = read_manifest(folder);
  const Plan plan = make_plan(manifest, options, true);
  const auto device = open_device("cpu");
  const auto draft = load_draft(folder, manifest, plan, *device);
  std::optional<CoupledNoise> noise;
  if (!item["noise"].is_null())
    noise = CoupledNoise{std::stoull(item["noise"]["seed"].get<std::string>()), item["noise"]["temperature"]};
  for (const Json& turn : item["turns"]) check_turn(checks, *draft, plan.gamma, turn, noise);
}

void check_chat(Checks& checks, const Json& cases, const fs::path& bundles) {
  for (const Json& item : cases) {
    std::vector<Message> messages;
    for (const Json& message : item["messages"]) messages.push_back({message["role"], message["content"]});
    const Manifest manifest = read_manifest(bundles / item["bundle"].get<std::string>());
    Json text, error;
    try {
      std::tm today{};
      if (!item["today"].is_null()) {
        today.tm_year = item["today"][0].get<int>() - 1900;
        today.tm_mon = item["today"][1].get<int>() - 1;
        today.tm_mday = item["today"][2];
      }
      text = render_chat(manifest.chat, messages, today);
    } catch (const Error& refusal) {
      error = refusal.what();
    }
    checks.check(text == item["text"] && error == item["error"], "chat " + item.dump() + " gave " + error.dump());
  }
}

Json refusal_of_room(const Json& devices) {
  std::vector<MemoryNeed> needs;
  for (const Json& device : devices) {
    needs.push_back({{device["pool"], {}}, {}});
    if (!device["free"].is_null()) needs.back().free.bytes = device["free"].get<std::uint64_t>();
    for (const Json& item : device["segments"]) needs.back().segments.push_back({item[0], item[1], item[2]});
  }
  try {
    check_room(needs);
    return nullptr;
  } catch (const Error& error) {
    return error.what();
  }
}

void check_memory(Checks& checks, const Json& memory, const fs::path& bundles) {
  for (const Json& item : memory["rooms"])
    checks.equal(refusal_of_room(item["devices"]), item["error"], "room " + item.dump());
  for (const Json& item : memory["segments"]) {
    const fs::path folder = bundles / item["bundle"].get<std::string>();
    const Form form = item["form"] == "rows" ? Form::rows : Form::inplace;
    const auto found =
        segment_memory(folder, read_manifest(folder).segment(item["segment"]), form, item["capacity"].get<int>());
    checks.check(found.weight_bytes == item["weights"] && found.cache_bytes == item["cache"], "memory " + item.dump());
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: mirror_vectors VECTORS BUNDLES\n");
    return 2;
  }
  const fs::path vectors = arguments[1], bundles = arguments[2];
  Checks checks;
  checks.group("noise", [&] { check_noise(checks, read(vectors / "noise.json")); });
  checks.group("sampling", [&] { check_sampling(checks, read(vectors / "sampling.json")); });
  checks.group("rounds", [&] { check_rounds(checks, read(vectors / "rounds.json")); });
  checks.group("manifests", [&] { check_manifests(checks, read(vectors / "manifests.json")); });
  checks.group("argmax", [&] { check_argmax(checks); });
  checks.group("generations", [&] { check_generations(checks, read(vectors / "generations.json"), bundles); });
  checks.group("chat", [&] { check_chat(checks, read(vectors / "chat.json"), bundles); });
  checks.group("memory", [&] { check_memory(checks, read(vectors / "memory.json"), bundles); });
  checks.group("drafts", [&] {
    for (const Json& item : read(vectors / "drafts.json"))
      check_draft(checks, item, bundles / item["bundle"].get<std::string>());
  });
  return checks.end();
}
