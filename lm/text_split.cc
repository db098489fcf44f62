// SPDX-License-Identifier: MIT
#define PCRE2_CODE_UNIT_WIDTH 8
#include "lm/text_split.h"

#include <pcre2.h>
#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>

#include "lm/error.h"

namespace parallax::lm {
namespace {

bool is_ascii(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](unsigned char c) { return c >= 0x80; });
}

// The length of the longest prefix that is UTF-8.
std::size_t valid_prefix(std::string_view text) {
  std::size_t position = 0;
  while (position < text.size()) {
    utf8proc_int32_t codepoint;
    const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data() + position);
    const auto size =
        utf8proc_iterate(bytes, static_cast<utf8proc_ssize_t>(text.size() - position), &codepoint);
    if (size <= 0) break;
    position += static_cast<std::size_t>(size);
  }
  return position;
}

void append_nfc(std::string_view valid, std::string& out) {
  utf8proc_uint8_t* normalized = nullptr;
  const auto size =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(valid.data()),
                   static_cast<utf8proc_ssize_t>(valid.size()), &normalized,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (size < 0) throw Error("cannot normalize text: " + std::string(utf8proc_errmsg(size)));
  out.append(reinterpret_cast<const char*>(normalized), static_cast<std::size_t>(size));
  std::free(normalized);
}

}  // namespace

std::string normalize_nfc(std::string_view text) {
  if (is_ascii(text)) return std::string(text);
  std::string out;
  while (!text.empty()) {
    const std::size_t valid = valid_prefix(text);
    if (valid > 0) append_nfc(text.substr(0, valid), out);
    text.remove_prefix(valid);
    if (text.empty()) break;
    out += text.front();
    text.remove_prefix(1);
  }
  return out;
}

struct RegexSplitter::Impl {
  ~Impl() { pcre2_code_free(code); }
  pcre2_code* code = nullptr;
  std::string name;
};

RegexSplitter::RegexSplitter(const std::string& pattern, const std::string& name)
    : impl_(std::make_unique<Impl>()) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  impl_->name = name;
  impl_->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MATCH_INVALID_UTF, &error, &offset, nullptr);
  if (!impl_->code) {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof message);
    throw Error(name + ": bad regular expression at character " + std::to_string(offset) + ": " +
                reinterpret_cast<const char*>(message));
  }
  // Where the CPU has no JIT, matching is merely slower.
  pcre2_jit_compile(impl_->code, PCRE2_JIT_COMPLETE);
}

RegexSplitter::~RegexSplitter() = default;
RegexSplitter::RegexSplitter(RegexSplitter&&) noexcept = default;

void RegexSplitter::split(std::string_view text, std::vector<std::string_view>& pieces) const {
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> match(
      pcre2_match_data_create(1, nullptr), pcre2_match_data_free);
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  std::size_t done = 0;  // everything before it is in pieces
  std::size_t from = 0;
  const auto emit = [&](std::size_t end) {
    if (end > done) pieces.push_back(text.substr(done, end - done));
    done = end;
  };
  while (from < text.size()) {
    const int found = pcre2_match(impl_->code, subject, text.size(), from, 0, match.get(), nullptr);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) {
      PCRE2_UCHAR message[256];
      pcre2_get_error_message(found, message, sizeof message);
      throw Error(impl_->name + ": its regular expression fails on this text: " +
                  reinterpret_cast<const char*>(message));
    }
    const PCRE2_SIZE* ends = pcre2_get_ovector_pointer(match.get());
    if (ends[1] <= ends[0]) {  // empty: go on behind the next byte
      from = std::max(ends[0], from) + 1;
      continue;
    }
    emit(ends[0]);
    emit(ends[1]);
    from = ends[1];
  }
  emit(text.size());
}

void LiteralFinder::add(std::string literal, int id) {
  const auto first = static_cast<unsigned char>(literal.front());
  literals_.push_back({std::move(literal), id});
  auto& candidates = by_first_byte_[first];
  candidates.push_back(static_cast<int>(literals_.size()) - 1);
  std::stable_sort(candidates.begin(), candidates.end(), [&](int a, int b) {
    return literals_[static_cast<std::size_t>(a)].text.size() >
           literals_[static_cast<std::size_t>(b)].text.size();
  });
}

LiteralFinder::Match LiteralFinder::find(std::string_view text, std::size_t from) const {
  for (std::size_t begin = from; begin < text.size(); ++begin) {
    for (const int index : by_first_byte_[static_cast<unsigned char>(text[begin])]) {
      const Literal& literal = literals_[static_cast<std::size_t>(index)];
      if (text.substr(begin).starts_with(literal.text)) {
        return {begin, literal.text.size(), literal.id};
      }
    }
  }
  return {};
}

}  // namespace parallax::lm
