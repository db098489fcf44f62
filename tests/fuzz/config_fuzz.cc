// SPDX-License-Identifier: MIT
#include <cstdlib>

#include "lm/config.h"
#include "tests/fuzz/input.h"

// A config, and the same text as an override. What was accepted must come back from its own TOML.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace parallax::lm;
  const std::string_view input = as_text(data, size);
  expect_value_or_error([&] {
    const std::string again = to_toml(parse_config(input, "input"));
    if (to_toml(parse_config(again, "again")) != again) std::abort();
  });
  expect_value_or_error([&] { parse_config("", "input", {std::string(input)}); });
  return 0;
}
