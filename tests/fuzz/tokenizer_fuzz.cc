// SPDX-License-Identifier: MIT
#include <cstdlib>
#include <memory>

#include "lm/text_split.h"
#include "lm/tokenizer.h"
#include "tests/fuzz/input.h"

namespace parallax::lm {
namespace {

// The pattern of Qwen's tokenizers.
const RegexSplitter& splitter() {
  static const RegexSplitter kSplitter(
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
      "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
      "pattern");
  return kSplitter;
}

}  // namespace
}  // namespace parallax::lm

// The input as a tokenizer.json, and as text to normalize and cut: the pieces must be the text.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace parallax::lm;
  const std::string_view input = as_text(data, size);
  expect_value_or_error([&] {
    const auto tokenizer = parse_tokenizer(std::string(input), "input");
    tokenizer->decode(tokenizer->encode(input));
  });
  const std::string text = normalize_nfc(input);
  if (normalize_nfc(text) != text) std::abort();
  std::vector<std::string_view> pieces;
  splitter().split(text, pieces);
  std::string joined;
  for (const std::string_view piece : pieces) joined += piece;
  if (joined != text) std::abort();
  return 0;
}
