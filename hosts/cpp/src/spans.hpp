// Notes of who spent which time. One log per thread; no locks.
#pragma once

#include <utility>
#include <vector>

#include "records.hpp"

namespace mirror {

class SpanLog {
 public:
  // Notes the time until it goes out of scope.
  class Open {
   public:
    Open(SpanLog& log, SpanName name) : log_(log), name_(name), start_(Clock::now()) {}
    ~Open() { log_.note(name_, start_); }
    Open(const Open&) = delete;
    Open& operator=(const Open&) = delete;

   private:
    SpanLog& log_;
    SpanName name_;
    Clock::time_point start_;
  };

  Open span(SpanName name) { return Open(*this, name); }

  // Notes the time from a moment until now.
  void note(SpanName name, Clock::time_point start) { spans_.push_back({name, start, Clock::now()}); }

  // What was noted since the last call.
  std::vector<Span> take() { return std::exchange(spans_, {}); }

 private:
  std::vector<Span> spans_;
};

}  // namespace mirror
