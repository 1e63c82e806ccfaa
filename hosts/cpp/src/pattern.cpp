#include "pattern.hpp"

#include <algorithm>
#include <bitset>
#include <climits>
#include <cstring>
#include <functional>
#include <utility>

#include "error.hpp"
#include "unicode.hpp"

namespace mirror {
namespace {

// A set of characters: ranges and categories, perhaps turned round.
struct CharSet {
  std::vector<std::pair<char32_t, char32_t>> ranges;
  std::bitset<30> categories;
  bool white_space = false, not_white_space = false, negated = false, ignore_case = false;
  std::vector<CharSet> parts;  // sets that are turned round themselves, as \P{L} within brackets

  bool has(char32_t point) const { return holds(point) != negated; }

 private:
  bool in_range(char32_t point) const {
    return std::any_of(ranges.begin(), ranges.end(),
                       [point](const auto& range) { return point >= range.first && point <= range.second; });
  }

  bool holds(char32_t point) const {
    if (in_range(point)) return true;
    // ASCII case is all that the contractions of these files need.
    if (ignore_case && point < 128 && std::isalpha(static_cast<int>(point)) && in_range(point ^ 0x20)) return true;
    if (white_space && is_white_space(point)) return true;
    if (not_white_space && !is_white_space(point)) return true;
    if (categories.any() && categories.test(category_of(point))) return true;
    return std::any_of(parts.begin(), parts.end(), [point](const CharSet& part) { return part.has(point); });
  }
};

}  // namespace

struct Pattern::Node {
  enum class Kind { set, sequence, choice, look_ahead, start, end } kind = Kind::sequence;
  CharSet set;
  std::vector<Node> parts;
  bool negated = false;     // of a look-ahead
  int least = 1, most = 1;  // repetitions
  bool lazy = false, possessive = false;
};

namespace {

using Node = Pattern::Node;

class Parser {
 public:
  explicit Parser(const std::string& source) : source_(source), text_(decode_utf8(source).points) {}

  Node parse() {
    Node node = choice();
    if (at_ != text_.size()) refuse("an unexpected )");
    return node;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Error(ErrorKind::bundle, "the tokenizer's pattern " + source_ + " has " + what +
                                       ", which this host doesn't know; encode in Python, or work with tokens");
  }

  bool more() const { return at_ < text_.size(); }
  char32_t peek() const { return more() ? text_[at_] : 0; }
  bool take(char32_t wanted) { return more() && text_[at_] == wanted ? (++at_, true) : false; }
  bool take(const char* wanted) {
    const std::size_t size = std::strlen(wanted);
    if (at_ + size > text_.size() ||
        !std::equal(wanted, wanted + size, text_.begin() + static_cast<std::ptrdiff_t>(at_)))
      return false;
    at_ += size;
    return true;
  }

  Node choice() {
    Node node;
    node.kind = Node::Kind::choice;
    do node.parts.push_back(sequence());
    while (take(U'|'));
    return node.parts.size() == 1 ? std::move(node.parts.front()) : node;
  }

  Node sequence() {
    Node node;
    while (more() && peek() != U'|' && peek() != U')') node.parts.push_back(repeated(atom()));
    return node;
  }

  Node repeated(Node node) {
    if (take(U'?'))
      node.least = 0;
    else if (take(U'*'))
      node.least = 0, node.most = INT_MAX;
    else if (take(U'+'))
      node.most = INT_MAX;
    else if (take(U'{')) {
      node.least = number();
      node.most = take(U',') ? (peek() == U'}' ? INT_MAX : number()) : node.least;
      if (!take(U'}')) refuse("a broken {m,n}");
    } else
      return node;
    if (take(U'?'))
      node.lazy = true;
    else if (take(U'+'))
      node.possessive = true;
    return node;
  }

  int number() {
    int value = 0;
    while (peek() >= U'0' && peek() <= U'9' && value < 100000)
      value = value * 10 + static_cast<int>(text_[at_++] - U'0');
    return value;
  }

  Node atom() {
    if (take("(?i:")) return group(true);
    if (take("(?:")) return group(ignore_case_);
    if (take("(?!")) return look_ahead(true);
    if (take("(?=")) return look_ahead(false);
    if (take("(?")) refuse("a group (?");
    if (take(U'(')) return group(ignore_case_);
    Node node;
    if (take(U'^')) return node.kind = Node::Kind::start, node;
    if (take(U'$')) return node.kind = Node::Kind::end, node;
    node.kind = Node::Kind::set;
    if (take(U'['))
      node.set = brackets();
    else if (take(U'\\'))
      node.set = escape();
    else if (take(U'.'))
      node.set.negated = true, node.set.ranges.emplace_back(U'\n', U'\n');
    else
      node.set.ranges.emplace_back(peek(), peek()), ++at_;
    node.set.ignore_case = ignore_case_;
    return node;
  }

  Node group(bool ignore_case) {
    const bool before = std::exchange(ignore_case_, ignore_case);
    Node node;
    node.parts.push_back(choice());
    ignore_case_ = before;
    if (!take(U')')) refuse("an unclosed group");
    return node;
  }

  Node look_ahead(bool negated) {
    Node node = group(ignore_case_);
    node.kind = Node::Kind::look_ahead;
    node.negated = negated;
    return node;
  }

  CharSet brackets() {
    CharSet set;
    set.negated = take(U'^');
    do {
      if (!more()) refuse("an unclosed [");
      if (take("&&")) refuse("&& within brackets");
      if (take(U'[')) {
        set.parts.push_back(brackets());
        continue;
      }
      CharSet item;
      if (take(U'\\'))
        item = escape();
      else
        item.ranges.emplace_back(peek(), peek()), ++at_;
      if (peek() == U'-' && at_ + 1 < text_.size() && text_[at_ + 1] != U']' && item.ranges.size() == 1) extend(item);
      set.parts.push_back(std::move(item));
    } while (!take(U']'));
    return set;
  }

  void extend(CharSet& item) {
    ++at_;
    if (take(U'\\'))
      item.ranges[0].second = escape().ranges.at(0).second;
    else
      item.ranges[0].second = text_[at_++];
  }

  CharSet escape() {
    CharSet set;
    const char32_t letter = more() ? text_[at_++] : 0;
    const auto one = [&set](char32_t point) { set.ranges.emplace_back(point, point); };
    switch (letter) {
      case U's': set.white_space = true; break;
      case U'S': set.not_white_space = true; break;
      case U'd': set.categories = named("Nd"); break;
      case U'n': one(U'\n'); break;
      case U'r': one(U'\r'); break;
      case U't': one(U'\t'); break;
      case U'p':
      case U'P':
        set.categories = property();
        set.negated = letter == U'P';
        break;
      default:
        if (letter == 0 || (letter < 128 && std::isalnum(static_cast<int>(letter))))
          refuse("an escape \\" + std::string(1, static_cast<char>(letter)));
        one(letter);
    }
    return set;
  }

  std::bitset<30> property() {
    std::string name;
    if (take(U'{')) {
      while (more() && peek() != U'}') append_utf8(name, text_[at_++]);
      take(U'}');
    } else {
      append_utf8(name, text_[at_++]);
    }
    return named(name);
  }

  std::bitset<30> named(const std::string& name) const {
    std::bitset<30> categories;
    for (std::size_t index = 0; index < 30; ++index)
      if (std::string(category_names[index]).rfind(name, 0) == 0) categories.set(index);
    if (categories.none() || name.empty()) refuse("\\p{" + name + "}");
    return categories;
  }

  const std::string source_;
  std::vector<char32_t> text_;
  std::size_t at_ = 0;
  bool ignore_case_ = false;
};

// Calls on with the end of each way to match, greedy first, until one is taken.
using Continue = std::function<int(int)>;

class Matcher {
 public:
  explicit Matcher(const std::vector<char32_t>& text) : text_(text) {}

  int run(const Node& node, int at, const Continue& then) const {
    if (node.least == 1 && node.most == 1) return once(node, at, then);
    return node.kind == Node::Kind::set ? repeat_set(node, at, then) : repeat(node, at, 0, then);
  }

 private:
  int once(const Node& node, int at, const Continue& then) const {
    switch (node.kind) {
      case Node::Kind::set: return has(node, at) ? then(at + 1) : -1;
      case Node::Kind::start: return at == 0 ? then(at) : -1;
      case Node::Kind::end: return at == static_cast<int>(text_.size()) ? then(at) : -1;
      case Node::Kind::sequence: return sequence(node, 0, at, then);
      case Node::Kind::look_ahead: {
        const bool found = sequence(node, 0, at, [](int end) { return end; }) >= 0;
        return found != node.negated ? then(at) : -1;
      }
      default:
        for (const Node& part : node.parts)
          if (const int end = run(part, at, then); end >= 0) return end;
        return -1;
    }
  }

  bool has(const Node& node, int at) const {
    return at < static_cast<int>(text_.size()) && node.set.has(text_[static_cast<std::size_t>(at)]);
  }

  int sequence(const Node& node, std::size_t index, int at, const Continue& then) const {
    if (index == node.parts.size()) return then(at);
    return run(node.parts[index], at, [&, index](int end) { return sequence(node, index + 1, end, then); });
  }

  // Repeated characters need no recursion, however long the run.
  int repeat_set(const Node& node, int at, const Continue& then) const {
    int count = 0;
    if (node.lazy) {
      for (;; ++count) {
        if (count >= node.least)
          if (const int end = then(at + count); end >= 0) return end;
        if (count == node.most || !has(node, at + count)) return -1;
      }
    }
    while (count < node.most && has(node, at + count)) ++count;
    if (node.possessive) return count >= node.least ? then(at + count) : -1;
    for (; count >= node.least; --count)
      if (const int end = then(at + count); end >= 0) return end;
    return -1;
  }

  int repeat(const Node& node, int at, int count, const Continue& then) const {
    if (count < node.most) {
      const int end = once(node, at, [&, at, count](int next) {
        return next == at && count >= node.least ? -1 : repeat(node, next, count + 1, then);
      });
      if (end >= 0) return end;
    }
    return count >= node.least ? then(at) : -1;
  }

  const std::vector<char32_t>& text_;
};

}  // namespace

Pattern::Pattern(const std::string& source) : root_(std::make_unique<Node>(Parser(source).parse())) {}
Pattern::~Pattern() = default;
Pattern::Pattern(Pattern&&) noexcept = default;

int Pattern::match(const std::vector<char32_t>& text, int at) const {
  return Matcher(text).run(*root_, at, [](int end) { return end; });
}

}  // namespace mirror
