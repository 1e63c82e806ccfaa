#include "worker.hpp"

namespace mirror {
namespace {

constexpr std::chrono::seconds close_wait{1};

const char* name_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::bundle: return "BundleError";
    case ErrorKind::device: return "DeviceError";
    case ErrorKind::capacity: return "CapacityError";
    case ErrorKind::draft: return "DraftError";
    case ErrorKind::request: return "RequestError";
    default: return "BusyError";
  }
}

}  // namespace

std::string current_error() {
  try {
    throw;
  } catch (const Error& error) {
    return std::string(name_of(error.kind())) + ": " + error.what();
  } catch (const std::exception& error) {
    return std::string("exception: ") + error.what();
  } catch (...) {
    return "unknown exception";
  }
}

DraftSeat::DraftSeat(std::unique_ptr<Draft> draft, double timeout_s)
    : room_(std::make_shared<Room>()), timeout_s_(timeout_s) {
  room_->draft = std::move(draft);
  thread_ = std::thread([room = room_] { serve(room); });
}

DraftSeat::~DraftSeat() {
  {
    std::unique_lock<std::mutex> lock(room_->mutex);
    room_->closing = true;
    room_->changed.notify_all();
    room_->changed.wait_for(lock, close_wait, [this] { return room_->ended; });
    if (!room_->ended) {
      thread_.detach();
      return;
    }
  }
  thread_.join();
}

void DraftSeat::lose(const std::string& why) {
  lost_ =
      "the draft failed (" + why + "); generation goes on without it, in plain mode, until the bundle is loaded again";
  throw Error(ErrorKind::draft, *lost_);
}

void DraftSeat::push(Task task) {
  const std::lock_guard<std::mutex> lock(room_->mutex);
  room_->tasks.push_back(std::move(task));
  room_->changed.notify_all();
}

void DraftSeat::serve(const std::shared_ptr<Room>& room) {
  std::unique_lock<std::mutex> lock(room->mutex);
  for (;;) {
    room->changed.wait(lock, [&] { return room->closing || !room->tasks.empty(); });
    if (room->tasks.empty()) break;
    {
      const Task task = std::move(room->tasks.front());
      room->tasks.pop_front();
      lock.unlock();
      task(*room->draft);
    }
    lock.lock();
  }
  room->ended = true;
  room->changed.notify_all();
}

}  // namespace mirror
