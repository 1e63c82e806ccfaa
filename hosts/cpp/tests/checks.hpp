// A test program's bookkeeping: named checks, and the closing line.
#pragma once

#include <cstdio>
#include <exception>
#include <string>

class Checks {
 public:
  void check(bool holds, const std::string& what) {
    (holds ? passed_ : failed_)++;
    if (!holds) std::printf("FAILED %s\n", what.c_str());
  }

  template <typename Found, typename Expected>
  void equal(const Found& found, const Expected& expected, const std::string& what) {
    check(found == expected, what);
  }

  // Runs a group of checks; an exception is one failure, and the next group goes on.
  template <typename Run>
  void group(const std::string& name, Run run) {
    try {
      run();
    } catch (const std::exception& error) {
      check(false, name + ": " + error.what());
    }
  }

  // The exit status.
  int end() const {
    std::printf("%d passed, %d failed\n", passed_, failed_);
    return failed_ == 0 && passed_ > 0 ? 0 : 1;
  }

 private:
  int passed_ = 0, failed_ = 0;
};
