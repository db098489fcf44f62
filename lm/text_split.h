// SPDX-License-Identifier: MIT
// What byte-level BPE does to text before it merges: Unicode normalization and cutting into pieces.
// Text may hold bytes that are no UTF-8; they stay as they are, in pieces of their own.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace parallax::lm {

// Normalization form C of the valid stretches of text.
std::string normalize_nfc(std::string_view text);

// Cuts text at the matches of a regular expression; matches and what lies between are the pieces.
class RegexSplitter {
 public:
  // A Perl-compatible pattern, \s \p{L} and case in Unicode. Throws Error where it does not
  // compile.
  RegexSplitter(const std::string& pattern, const std::string& name);
  ~RegexSplitter();
  RegexSplitter(RegexSplitter&&) noexcept;

  // Appends the non-empty pieces, in order; together they are the text. Throws Error where the
  // pattern needs more backtracking than is allowed.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Finds given strings in text, the leftmost first and, of those that begin there, the longest.
class LiteralFinder {
 public:
  void add(std::string literal, int id);
  bool empty() const { return literals_.empty(); }

  struct Match {
    std::size_t begin = std::string_view::npos;  // npos: none
    std::size_t size = 0;
    int id = 0;
  };
  Match find(std::string_view text, std::size_t from) const;

 private:
  struct Literal {
    std::string text;
    int id;
  };
  std::vector<Literal> literals_;
  std::vector<int> by_first_byte_[256];  // indices of literals, longest first
};

}  // namespace parallax::lm
