// The text of an asm statement, read once: instructions over numbered 64-bit registers.
#pragma once
#include <ctype.h>
#include <stdlib.h>

#include <map>
#include <string>
#include <vector>

namespace ptx {

struct Operand {
  enum Kind { REGISTER, NUMBER, ADDRESS, LIST } kind = NUMBER;
  int reg = -1;       // of a register, or an address' base; -1 when the base is a number
  uint64_t number = 0;  // or an address' offset
  std::vector<Operand> list;
};

struct Instruction {
  std::string text;                // as written, for findings
  std::vector<std::string> parts;  // mma, sync, aligned ...
  std::vector<Operand> operands;
  int predicate = -1;
  bool negated = false;

  const std::string& name() const { return parts[0]; }
  const std::string& type() const { return parts.back(); }
  bool has(const char* part) const {
    for (const std::string& p : parts)
      if (p == part) return true;
    return false;
  }
};

// Registers 0 .. count-1 are the statement's %0, %1 ...; then come those it names itself.
struct Program {
  std::vector<Instruction> instructions;
  std::map<std::string, int> names;
  int registers;
  std::vector<std::pair<int, std::string>> special;  // %laneid and the like
  std::string error;
};

inline std::string trimmed(const std::string& s) {
  const size_t first = s.find_first_not_of(" \t\n\r"), last = s.find_last_not_of(" \t\n\r");
  return first == std::string::npos ? "" : s.substr(first, last - first + 1);
}

// Cut at `at` outside brackets.
inline std::vector<std::string> cut(const std::string& s, char at) {
  std::vector<std::string> out(1);
  int depth = 0;
  for (char c : s) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == at && !depth)
      out.emplace_back();
    else
      out.back() += c;
  }
  for (std::string& piece : out) piece = trimmed(piece);
  return out;
}

class Parser {
 public:
  Parser(const char* text, int operands) : operands_(operands) {
    program_.registers = operands;
    std::string plain = without_comments(text);
    for (char& c : plain)
      if (c == '{' && scope_brace(&c - plain.data(), plain)) c = ' ';
    for (std::string& statement : cut_statements(plain)) {
      statement = trimmed(statement);
      if (!statement.empty() && statement.rfind(".reg", 0) != 0) add(statement);
    }
  }
  Program take() { return std::move(program_); }

 private:
  Program program_;
  int operands_;

  static std::string without_comments(std::string s) {
    for (size_t a; (a = s.find("//")) != std::string::npos;) {
      const size_t end = s.find('\n', a);
      s.erase(a, end == std::string::npos ? std::string::npos : end - a);
    }
    for (size_t a; (a = s.find("/*")) != std::string::npos;) {
      const size_t end = s.find("*/", a);
      s.erase(a, end == std::string::npos ? std::string::npos : end + 2 - a);
    }
    return s;
  }
  // A brace that opens a scope comes first in its statement; other braces hold register lists.
  static bool scope_brace(size_t at, const std::string& s) {
    while (at && isspace(static_cast<unsigned char>(s[at - 1]))) at--;
    return !at || s[at - 1] == ';' || s[at - 1] == '{' || s[at - 1] == '}';
  }
  static std::vector<std::string> cut_statements(const std::string& s) {
    std::vector<std::string> out(1);
    int depth = 0;
    for (char c : s) {
      if (c == '{') depth++;
      if (c == '}' && depth-- <= 0) {  // closes a scope
        depth = 0;
        continue;
      }
      if (c == ';')
        out.emplace_back();
      else
        out.back() += c;
    }
    return out;
  }

  int reg(const std::string& name) {
    if (name[0] == '%' && isdigit(static_cast<unsigned char>(name[1]))) {
      const int number = atoi(name.c_str() + 1);
      if (number >= operands_) program_.error = "no operand " + name;
      return number < operands_ ? number : 0;
    }
    const bool special = name.rfind("%%", 0) == 0;
    auto found = program_.names.emplace(name, program_.registers);
    if (found.second) {
      if (special) program_.special.emplace_back(program_.registers, name.substr(2));
      program_.registers++;
    }
    return found.first->second;
  }

  static bool is_number(const std::string& s) {
    return isdigit(static_cast<unsigned char>(s[0])) ||
           (s[0] == '-' && s.size() > 1 && isdigit(static_cast<unsigned char>(s[1])));
  }
  static uint64_t number(const std::string& s) {
    if (s[0] == '0' && (s[1] == 'f' || s[1] == 'F')) return strtoull(s.c_str() + 2, nullptr, 16);
    return s[0] == '-' ? uint64_t(strtoll(s.c_str(), nullptr, 0)) : strtoull(s.c_str(), nullptr, 0);
  }

  Operand operand(const std::string& s) {
    Operand o;
    if (s.empty()) {
      program_.error = "an empty operand";
    } else if (s[0] == '[') {
      o.kind = Operand::ADDRESS;
      const std::string inside = trimmed(s.substr(1, s.size() - 2));
      const size_t plus = inside.find('+');
      const std::string base = trimmed(inside.substr(0, plus));
      if (plus != std::string::npos) o.number = number(trimmed(inside.substr(plus + 1)));
      if (is_number(base))
        o.number += number(base);
      else
        o.reg = reg(base);
    } else if (s[0] == '{') {
      o.kind = Operand::LIST;
      for (const std::string& part : cut(s.substr(1, s.size() - 2), ','))
        o.list.push_back(operand(part));
    } else if (is_number(s)) {
      o.number = number(s);
    } else {
      o.kind = Operand::REGISTER;
      o.reg = reg(s);
    }
    return o;
  }

  void add(std::string s) {
    Instruction i;
    i.text = s;
    if (s[0] == '@') {
      const size_t end = s.find_first_of(" \t\n");
      i.negated = s[1] == '!';
      i.predicate = reg(s.substr(1 + i.negated, end - 1 - i.negated));
      s = trimmed(s.substr(end == std::string::npos ? s.size() : end));
    }
    const size_t end = s.find_first_of(" \t\n");
    i.parts = cut(s.substr(0, end), '.');
    if (end != std::string::npos)
      for (const std::string& part : cut(s.substr(end), ',')) i.operands.push_back(operand(part));
    program_.instructions.push_back(i);
  }
};

}  // namespace ptx
