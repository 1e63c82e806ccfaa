#include "chat.hpp"

#include <algorithm>
#include <iomanip>
#include <locale>
#include <sstream>

#include "error.hpp"
#include "json_reader.hpp"
#include "unicode.hpp"

namespace mirror {
namespace {

// What Python's str.strip takes away.
bool is_blank(char32_t character) { return is_white_space(character) || (character >= 0x1C && character <= 0x1F); }

std::string trimmed(const std::string& text) {
  const CodePoints characters = decode_utf8(text);
  std::size_t first = 0, last = characters.points.size();
  while (first < last && is_blank(characters.points[first])) ++first;
  while (last > first && is_blank(characters.points[last - 1])) --last;
  return text.substr(characters.offsets[first], characters.offsets[last] - characters.offsets[first]);
}

std::string written(const std::tm& day, const std::string& pattern) {
  std::ostringstream text;
  text.imbue(std::locale::classic());  // English names, wherever this runs
  text << std::put_time(&day, pattern.c_str());
  return text.str();
}

std::string dated(std::string text, const std::string& today) {
  const std::string mark = "{{date}}";
  for (std::size_t at = text.find(mark); at != std::string::npos; at = text.find(mark, at + today.size()))
    text.replace(at, mark.size(), today);
  return text;
}

const std::string& join(const ChatFormat& format, const std::string& before, const std::string& after) {
  const auto from = format.joins.find(before);
  if (from != format.joins.end()) {
    const auto to = from->second.find(after);
    if (to != from->second.end()) return to->second;
  }
  throw Error(ErrorKind::request,
              "the bundle's chat format has no " + after + " after " + before +
                  "; its messages are an optional system, then user and assistant in turn, the user last");
}

void check_content(const ChatFormat& format, const std::string& content) {
  for (const std::string& odd : format.refused)
    if (content.find(odd) != std::string::npos)
      throw Error(ErrorKind::request, "a message holds " + python_text(odd) +
                                          ", which the model's chat template treats in a way of its own; render the "
                                          "template and pass the prompt as text");
  if (!format.empty && trimmed(content).empty())
    throw Error(ErrorKind::request,
                "a message is empty, and the model's chat template has its own way with that; leave it out");
}

}  // namespace

std::string render_chat(const std::optional<ChatFormat>& format, const std::vector<Message>& messages,
                        const std::tm& today) {
  if (!format)
    throw Error(ErrorKind::request,
                "the bundle has no chat format as data (its model has no chat template, or one that fixed texts don't "
                "tell, or an older export made it); write the model's format yourself, pass it as text, and leave "
                "special tokens out");
  if (messages.empty())
    throw Error(ErrorKind::request, "the list of messages is empty; pass at least one with a role and a content");
  const auto between = [&](const std::string& before, const std::string& after) {
    const std::string& text = join(*format, before, after);
    return format->date ? dated(text, written(today, *format->date)) : text;
  };
  std::string text, before = "start";
  for (const Message& message : messages) {
    const bool trims = std::count(format->trimmed.begin(), format->trimmed.end(), message.role) > 0;
    const std::string content = trims ? trimmed(message.content) : message.content;
    check_content(*format, content);
    text += between(before, message.role) + content;
    before = message.role;
  }
  return text + between(before, "answer");
}

std::tm local_day() {
  const std::time_t now = std::time(nullptr);
  std::tm day{};
#ifdef _WIN32
  localtime_s(&day, &now);
#else
  localtime_r(&now, &day);
#endif
  return day;
}

}  // namespace mirror
