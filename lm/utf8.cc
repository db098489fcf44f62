// SPDX-License-Identifier: MIT
#include "lm/utf8.h"

#include <utf8proc.h>

namespace parallax::lm {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// Whether the text may yet become a character when more bytes follow.
bool is_incomplete(std::string_view text) {
  const auto lead = static_cast<unsigned char>(text[0]);
  const std::size_t wanted = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() >= wanted) return false;
  for (char byte : text.substr(1)) {
    if ((static_cast<unsigned char>(byte) & 0xC0) != 0x80) return false;
  }
  return true;
}

// Moves whole characters from the front of `bytes` to the result; with `at_end` all of it.
std::string take_characters(std::string& bytes, bool at_end) {
  std::string out;
  std::size_t at = 0;
  while (at < bytes.size()) {
    const std::size_t length = utf8_length(bytes, at);
    if (length == 0 && !at_end && is_incomplete(std::string_view(bytes).substr(at))) break;
    out += length > 0 ? std::string_view(bytes).substr(at, length) : kReplacement;
    at += length > 0 ? length : 1;
  }
  bytes.erase(0, at);
  return out;
}

}  // namespace

std::size_t utf8_length(std::string_view text, std::size_t at) {
  utf8proc_int32_t character = 0;
  const utf8proc_ssize_t length =
      utf8proc_iterate(reinterpret_cast<const utf8proc_uint8_t*>(text.data() + at),
                       static_cast<utf8proc_ssize_t>(text.size() - at), &character);
  return length > 0 ? static_cast<std::size_t>(length) : 0;
}

std::string Utf8Stream::push(std::string_view bytes) {
  pending_ += bytes;
  return take_characters(pending_, false);
}

std::string Utf8Stream::finish() { return take_characters(pending_, true); }

std::string to_utf8(std::string_view bytes) {
  std::string text(bytes);
  return take_characters(text, true);
}

}  // namespace parallax::lm
