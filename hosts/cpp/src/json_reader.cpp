#include "json_reader.hpp"

#include <algorithm>
#include <fstream>

namespace mirror {
namespace {

std::string quoted(const std::string& text) { return "'" + text + "'"; }

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return text;
}

}  // namespace

Json read_json(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  try {
    if (!stream) throw std::runtime_error("it can't be opened");
    return Json::parse(stream);
  } catch (const std::exception& error) {
    throw Error(ErrorKind::bundle,
                path.string() + " is not readable JSON (" + error.what() + "); export the bundle again");
  }
}

std::string python_text(const Json& value) {
  if (value.is_string()) return quoted(value.get<std::string>());
  if (value.is_null()) return "None";
  if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
  if (value.is_array()) {
    std::vector<std::string> parts;
    for (const Json& item : value) parts.push_back(python_text(item));
    return "[" + joined(parts) + "]";
  }
  if (value.is_object()) {
    std::vector<std::string> parts;
    for (const auto& [key, item] : value.items()) parts.push_back(quoted(key) + ": " + python_text(item));
    return "{" + joined(parts) + "}";
  }
  return value.dump();
}

JsonObject::JsonObject(const Json& value, std::string file, std::string where)
    : value_(value), file_(std::move(file)), where_(std::move(where)) {
  if (!value.is_object()) fail("", python_text(value) + " is not of type 'object'");
}

void JsonObject::fail(const std::string& key, const std::string& message) const {
  const std::string place = key.empty() ? where_ : path(key);
  throw Error(ErrorKind::bundle, file_ + ": at " + (place.empty() ? "the top level" : place) + ": " + message +
                                     "; export the bundle again");
}

const Json& JsonObject::require(const char* key) {
  asked_.insert(key);
  const auto found = value_.find(key);
  if (found == value_.end()) fail("", quoted(key) + " is a required property");
  return *found;
}

std::string JsonObject::text(const char* key) {
  const Json& found = require(key);
  if (!found.is_string()) fail(key, python_text(found) + " is not of type 'string'");
  return found.get<std::string>();
}

std::string not_among(const Json& found, const std::vector<std::string>& choices) {
  std::vector<std::string> listed;
  for (const std::string& item : choices) listed.push_back(quoted(item));
  return python_text(found) + " is not one of [" + joined(listed) + "]";
}

std::string JsonObject::choice(const char* key, const std::vector<std::string>& choices) {
  const Json& found = require(key);
  if (found.is_string() && std::count(choices.begin(), choices.end(), found.get<std::string>()) > 0)
    return found.get<std::string>();
  fail(key, not_among(found, choices));
}

std::string JsonObject::hash(const char* key) {
  const std::string found = text(key);
  const bool hex =
      std::all_of(found.begin(), found.end(), [](char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); });
  if (found.size() != 64 || !hex) fail(key, quoted(found) + " does not match '^[0-9a-f]{64}$'");
  return found;
}

std::int64_t JsonObject::checked(const Json& found, const std::string& key, std::int64_t minimum) const {
  if (!found.is_number_integer()) fail(key, python_text(found) + " is not of type 'integer'");
  if (found.is_number_unsigned() && found.get<std::uint64_t>() > (std::uint64_t{1} << 62))
    fail(key, found.dump() + " is more than any machine holds");
  const auto number = found.get<std::int64_t>();
  if (number < minimum) fail(key, found.dump() + " is less than the minimum of " + std::to_string(minimum));
  return number;
}

std::int64_t JsonObject::number(const char* key, std::int64_t minimum) { return checked(require(key), key, minimum); }

double JsonObject::real(const char* key) {
  const Json& found = require(key);
  if (!found.is_number()) fail(key, python_text(found) + " is not of type 'number'");
  return found.get<double>();
}

std::optional<std::int64_t> JsonObject::nullable_number(const char* key) {
  const Json& found = require(key);
  if (found.is_null()) return std::nullopt;
  if (!found.is_number_integer()) fail(key, python_text(found) + " is not of type 'integer', 'null'");
  return checked(found, key, INT64_MIN);
}

std::vector<std::int64_t> JsonObject::numbers(const char* key, std::int64_t minimum) {
  std::vector<std::int64_t> result;
  std::size_t index = 0;
  for (const Json& item : array(key))
    result.push_back(checked(item, std::string(key) + "." + std::to_string(index++), minimum));
  return result;
}

bool JsonObject::boolean(const char* key) {
  const Json& found = require(key);
  if (!found.is_boolean()) fail(key, python_text(found) + " is not of type 'boolean'");
  return found.get<bool>();
}

std::vector<std::string> JsonObject::texts(const char* key, const std::vector<std::string>& choices) {
  std::vector<std::string> result;
  for (const Json& item : array(key)) {
    const std::string place = std::string(key) + "." + std::to_string(result.size());
    if (!choices.empty() && (!item.is_string() || std::count(choices.begin(), choices.end(), item) == 0))
      fail(place, not_among(item, choices));
    if (!item.is_string()) fail(place, python_text(item) + " is not of type 'string'");
    if (item.get<std::string>().empty()) fail(place, "'' should be non-empty");
    result.push_back(item);
  }
  return result;
}

JsonObject JsonObject::object(const char* key) { return item(require(key), key); }

const Json& JsonObject::array(const char* key) {
  const Json& found = require(key);
  if (!found.is_array()) fail(key, python_text(found) + " is not of type 'array'");
  return found;
}

const Json& JsonObject::any(const char* key) { return require(key); }

std::optional<bool> JsonObject::nullable_boolean(const char* key) {
  if (is_null(key)) return std::nullopt;
  if (!value_[key].is_boolean()) fail(key, python_text(value_[key]) + " is not of type 'boolean', 'null'");
  return boolean(key);
}

std::optional<std::string> JsonObject::nullable_text(const char* key) {
  if (is_null(key)) return std::nullopt;
  if (!value_[key].is_string()) fail(key, python_text(value_[key]) + " is not of type 'string', 'null'");
  return text(key);
}

std::optional<std::string> JsonObject::nullable_choice(const char* key, const std::vector<std::string>& choices) {
  if (is_null(key)) return std::nullopt;
  if (value_[key].is_string() && std::count(choices.begin(), choices.end(), value_[key].get<std::string>()) > 0)
    return text(key);
  std::vector<std::string> listed;
  for (const std::string& item : choices) listed.push_back(quoted(item));
  fail(key, python_text(value_[key]) + " is not one of [" + joined(listed) + ", None]");
}

bool JsonObject::is_null(const char* key) {
  asked_.insert(key);
  const auto found = value_.find(key);
  return found == value_.end() || found->is_null();
}

std::optional<std::vector<std::int64_t>> JsonObject::nullable_numbers(const char* key, std::int64_t minimum) {
  if (is_null(key)) return std::nullopt;
  if (!value_[key].is_array()) fail(key, python_text(value_[key]) + " is not of type 'array', 'null'");
  if (value_[key].empty()) fail(key, "[] should be non-empty");
  return numbers(key, minimum);
}

void JsonObject::end() const {
  std::vector<std::string> left;
  for (const auto& [key, item] : value_.items())
    if (asked_.count(key) == 0) left.push_back(quoted(key));
  if (left.empty()) return;
  fail("", "Additional properties are not allowed (" + joined(left) + (left.size() > 1 ? " were" : " was") +
               " unexpected)");
}

}  // namespace mirror
