// The draft's thread, and the seat that keeps a failing draft away from the text.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "draft.hpp"
#include "error.hpp"

namespace mirror {

// "DeviceError: message" of the exception being handled.
std::string current_error();

// Work handed to the draft's thread, and its result.
template <typename Result>
class Job {
 public:
  explicit Job(std::function<Result(Draft&)> work) : work_(std::move(work)) {}

  void run(Draft& draft) {
    std::optional<Result> result;
    std::string error;
    try {
      result = work_(draft);
    } catch (...) {
      error = current_error();
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    result_ = std::move(result);
    error_ = std::move(error);
    done_ = true;
    changed_.notify_all();
  }

  // The result. Throws a string that says why there is none.
  Result wait(double timeout_s) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), [this] { return done_; }))
      throw Error(ErrorKind::draft, "DraftError: no answer within " + short_number(timeout_s) + " s");
    if (!result_) throw Error(ErrorKind::draft, error_);
    return std::move(*result_);
  }

 private:
  static std::string short_number(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%g", value);
    return text;
  }

  std::function<Result(Draft&)> work_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::optional<Result> result_;
  std::string error_;
};

struct Nothing {};

// A draft on its own thread. One that throws or hangs is lost: it is never called again. A thread
// stuck inside a device can't be ended, so it is left alone with everything it may touch.
class DraftSeat {
 public:
  DraftSeat(std::unique_ptr<Draft> draft, double timeout_s);
  ~DraftSeat();
  DraftSeat(const DraftSeat&) = delete;
  DraftSeat& operator=(const DraftSeat&) = delete;

  // Hands work to the draft's thread; jobs run one at a time, in order.
  template <typename Result>
  std::shared_ptr<Job<Result>> start(std::function<Result(Draft&)> work) {
    auto job = std::make_shared<Job<Result>>(std::move(work));
    push([job](Draft& draft) { job->run(draft); });
    return job;
  }

  // Waits for a job. Throws Error(draft): the draft failed or hung, and is lost from now on.
  template <typename Result>
  Result finish(const std::shared_ptr<Job<Result>>& job) {
    try {
      return job->wait(timeout_s_);
    } catch (const Error& error) {
      lose(error.what());
    }
  }

  // Waits for what a proposal's passes give; for as long as it takes, as for any pass on a device like that. Throws as
  // `finish` does.
  void read(Proposal& proposal) {
    try {
      proposal.read();
    } catch (...) {
      lose(current_error());
    }
  }

  // Why the draft is gone; absent while it is there.
  const std::optional<std::string>& lost() const { return lost_; }

 private:
  using Task = std::function<void(Draft&)>;

  // What the thread owns too: it may outlive the seat.
  struct Room {
    std::unique_ptr<Draft> draft;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<Task> tasks;
    bool closing = false, ended = false;
  };

  [[noreturn]] void lose(const std::string& why);
  void push(Task task);
  static void serve(const std::shared_ptr<Room>& room);

  std::shared_ptr<Room> room_;
  double timeout_s_;
  std::optional<std::string> lost_;
  std::thread thread_;
};

}  // namespace mirror
