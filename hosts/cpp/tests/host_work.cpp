// Host work of a mirror round outside session calls: `mirror_host_work BUNDLE [ROUNDS]`. Run it on a bundle
// whose graphs cost next to nothing (`python -m tests.lookup FOLDER`). The time spent inside ONNX Runtime
// is added up by thread; what remains of a thread's round is host work. Prints one JSON line.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>

#include "engine.hpp"
#include "hooked.hpp"

namespace {

using namespace mirror;

struct Interval {
  Clock::time_point start, end;
};

// Intervals spent inside sessions, by thread.
class SessionClock {
 public:
  void note(Clock::time_point start) {
    const Interval interval{start, Clock::now()};
    const std::lock_guard<std::mutex> lock(mutex_);
    intervals_[std::this_thread::get_id()].push_back(interval);
  }

  double seconds(std::thread::id thread, Clock::time_point start, Clock::time_point end) const {
    double total = 0;
    for (const Interval& interval : intervals_.at(thread))
      if (interval.start >= start && interval.end <= end) total += seconds_between(interval.start, interval.end);
    return total;
  }

  std::thread::id other_than(std::thread::id thread) const {
    for (const auto& [id, found] : intervals_)
      if (id != thread) return id;
    return thread;
  }

 private:
  std::mutex mutex_;
  std::map<std::thread::id, std::vector<Interval>> intervals_;
};

class ClockedPass final : public BoundPass {
 public:
  ClockedPass(std::unique_ptr<BoundPass> inner, SessionClock& clock) : inner_(std::move(inner)), clock_(clock) {}
  void run(int past_length) override {
    const auto start = Clock::now();
    inner_->run(past_length);
    clock_.note(start);
  }
  std::optional<LaunchedIds> launched_ids() const override { return inner_->launched_ids(); }
  std::shared_ptr<SentIds> send_ids() override { return inner_->send_ids(); }
  void send() override { inner_->send(); }
  const PassOutputs& outputs() override { return inner_->outputs(); }
  const float* logits(int row) override { return inner_->logits(row); }
  float logit(int row, std::int64_t token) override { return inner_->logit(row, token); }
  const std::byte* hidden() override { return inner_->hidden(); }

 private:
  std::unique_ptr<BoundPass> inner_;
  SessionClock& clock_;
};

class ClockedSegment final : public Segment {
 public:
  ClockedSegment(std::unique_ptr<Segment> inner, SessionClock& clock) : inner_(std::move(inner)), clock_(clock) {}
  const std::vector<int>& widths() const override { return inner_->widths(); }
  bool launches() const override { return inner_->launches(); }
  std::unique_ptr<BoundPass> bind(PassFeeds& feeds, int rows, const std::shared_ptr<KVCache>& cache) override {
    return std::make_unique<ClockedPass>(inner_->bind(feeds, rows, cache), clock_);
  }
  std::shared_ptr<KVCache> make_cache() override { return inner_->make_cache(); }

 private:
  std::unique_ptr<Segment> inner_;
  SessionClock& clock_;
};

class ClockedDevice final : public Device {
 public:
  explicit ClockedDevice(SessionClock& clock) : clock_(clock) {}
  const std::string& name() const override { return inner_->name(); }
  Form form() const override { return inner_->form(); }
  std::unique_ptr<Segment> load_segment(const std::filesystem::path& folder, const SegmentFacts& facts, int capacity,
                                        const std::vector<PassShape>& shapes, const std::vector<PassShape>& later,
                                        int threads) override {
    return std::make_unique<ClockedSegment>(inner_->load_segment(folder, facts, capacity, shapes, later, threads),
                                            clock_);
  }

 private:
  std::shared_ptr<Device> inner_ = open_device("cpu");
  SessionClock& clock_;
};

bool is_wait(SpanName name) {
  return name == SpanName::candidate_wait || name == SpanName::rollout_wait || name == SpanName::redraft ||
         name == SpanName::draft_prefill_wait;
}

bool is_draft(SpanName name) { return name >= SpanName::draft_prefill; }

double target_us(const Round& round, const SessionClock& clock, std::thread::id thread) {
  double seconds = seconds_between(round.start, round.end) - clock.seconds(thread, round.start, round.end);
  for (const Span& span : round.spans)
    if (is_wait(span.name) && !is_draft(span.name)) seconds -= seconds_between(span.start, span.end);
  return 1e6 * seconds;
}

double draft_us(const Round& round, const SessionClock& clock, std::thread::id thread) {
  double seconds = 0;
  for (const Span& span : round.spans)
    if (is_draft(span.name) && !is_wait(span.name))
      seconds += seconds_between(span.start, span.end) - clock.seconds(thread, span.start, span.end);
  return 1e6 * seconds;
}

void print(const char* name, std::vector<double> values) {
  std::sort(values.begin(), values.end());
  const std::size_t tenth = values.size() / 10;
  std::printf("\"%s\": {\"p10\": %.2f, \"median\": %.2f, \"p90\": %.2f}, ", name, values[tenth],
              values[values.size() / 2], values[values.size() - 1 - tenth]);
}

void run(Engine& engine, std::int64_t tokens, std::unique_ptr<Answer>& answer) {
  GenerationOptions options;
  options.max_new_tokens = tokens;
  answer = engine.answer({1, 2, 3}, options);
  while (answer->next()) {
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: mirror_host_work BUNDLE [ROUNDS]\n");
    return 2;
  }
  const std::filesystem::path folder = arguments[1];
  SessionClock clock;
  Placement places;
  places.target = places.suffix = places.draft = std::make_shared<ClockedDevice>(clock);
  const auto engine = std::make_shared<Engine>(folder, read_manifest(folder), EngineOptions{}, places);
  std::unique_ptr<Answer> answer;
  run(*engine, 32, answer);
  answer.reset();
  run(*engine, count > 2 ? std::atoi(arguments[2]) : 200, answer);
  const auto here = std::this_thread::get_id(), there = clock.other_than(here);
  std::vector<double> target, draft, both;
  for (const Round& round : answer->rounds()) {
    if (round.branches == 0) continue;
    target.push_back(target_us(round, clock, here));
    draft.push_back(draft_us(round, clock, there));
    both.push_back(target.back() + draft.back());
  }
  std::printf(
      "{\"what\": \"host work per round outside session calls, microseconds\", \"gamma\": %d, \"branches\": %d, "
      "\"vocab_size\": %d, \"rounds\": %zu, ",
      engine->plan.gamma, engine->plan.branches(), engine->manifest.model.vocab_size, target.size());
  print("target_thread_us", target);
  print("draft_thread_us", draft);
  print("both_us", both);
  std::printf("\"round_ms\": %.3f}\n", answer->statistics().round_ms);
}
