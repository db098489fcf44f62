// SPDX-License-Identifier: MIT
// Text that is shown must be UTF-8, whatever bytes a model or a file holds. No torch in here.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace parallax::lm {

// The length of the well-formed character at text[at], 0 where there is none. REQUIRES: at <
// text.size().
std::size_t utf8_length(std::string_view text, std::size_t at);

// Cuts a stream of bytes into pieces of whole characters. A byte that can belong to no character
// becomes U+FFFD.
class Utf8Stream {
 public:
  // Takes bytes; returns every character complete by now (possibly none).
  std::string push(std::string_view bytes);
  // The end of the stream: what is still incomplete, as U+FFFD.
  std::string finish();

 private:
  std::string pending_;
};

// `bytes` as UTF-8.
std::string to_utf8(std::string_view bytes);

}  // namespace parallax::lm
