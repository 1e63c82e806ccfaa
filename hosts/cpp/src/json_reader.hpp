// Strict reading of JSON objects: every key is asked for once, with its type and limits, and none is
// left over. What breaks the rules is told in the words of the Python package's schema check.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "error.hpp"

namespace mirror {

using Json = nlohmann::json;

// Throws Error(bundle): the file isn't there, or holds something else.
Json read_json(const std::filesystem::path& path);

// A value as Python prints it, for messages.
std::string python_text(const Json& value);

// What is said of a value that is not among some choices.
std::string not_among(const Json& found, const std::vector<std::string>& choices);

// One object of a JSON document, and where it stands.
class JsonObject {
 public:
  // `file` begins every message; `where` is the object's path within it, empty at the top.
  JsonObject(const Json& value, std::string file, std::string where);

  std::string text(const char* key);
  std::string choice(const char* key, const std::vector<std::string>& choices);
  std::string hash(const char* key);
  // Absent and null are the same for these.
  std::optional<bool> nullable_boolean(const char* key);
  std::optional<std::string> nullable_text(const char* key);
  std::optional<std::string> nullable_choice(const char* key, const std::vector<std::string>& choices);
  // Numbers that, where they are there, are one at least.
  std::optional<std::vector<std::int64_t>> nullable_numbers(const char* key, std::int64_t minimum);
  std::int64_t number(const char* key, std::int64_t minimum);
  double real(const char* key);
  std::optional<std::int64_t> nullable_number(const char* key);
  std::vector<std::int64_t> numbers(const char* key, std::int64_t minimum);
  bool boolean(const char* key);
  // Texts that are not empty, or some of `choices`.
  std::vector<std::string> texts(const char* key, const std::vector<std::string>& choices = {});
  JsonObject object(const char* key);
  const Json& array(const char* key);
  const Json& any(const char* key);
  // Absent or null; counts as asked for.
  bool is_null(const char* key);
  bool has(const char* key) const { return value_.contains(key); }

  // Throws if a key was never asked for.
  void end() const;

  const Json& value() const { return value_; }
  [[noreturn]] void fail(const std::string& key, const std::string& message) const;
  std::string path(const std::string& key) const { return where_.empty() ? key : where_ + "." + key; }
  JsonObject item(const Json& value, const std::string& key) const { return {value, file_, path(key)}; }

 private:
  const Json& require(const char* key);
  std::int64_t checked(const Json& found, const std::string& key, std::int64_t minimum) const;

  const Json& value_;
  std::string file_, where_;
  std::set<std::string> asked_;
};

}  // namespace mirror
