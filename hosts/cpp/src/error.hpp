// The errors that this library raises on purpose; the C surface turns them into statuses.
#pragma once

#include <stdexcept>
#include <string>

namespace mirror {

// Whose fault it is. Same kinds as the Python package's exceptions.
enum class ErrorKind { bundle, device, capacity, draft, request, busy };

// Says what was found, what was expected and what to do.
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace mirror
