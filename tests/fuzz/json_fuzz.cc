// SPDX-License-Identifier: MIT
#include <cstdlib>

#include "lm/checksum.h"
#include "lm/dataset.h"
#include "lm/run_state.h"
#include "tests/fuzz/input.h"

namespace parallax::lm {
namespace {

// What was accepted must come back from its own text.
void parse(std::string_view text) {
  expect_value_or_error([&] {
    const std::string again = to_json(parse_run_state(text, "input"));
    if (to_json(parse_run_state(again, "again")) != again) std::abort();
  });
  expect_value_or_error([&] {
    const std::string again = to_json(parse_dataset_manifest(text, "input"));
    if (to_json(parse_dataset_manifest(again, "again")) != again) std::abort();
  });
}

}  // namespace
}  // namespace parallax::lm

// state.json and dataset.json: the input as a file, and as the content under a right checksum.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace parallax::lm;
  const std::string_view input = as_text(data, size);
  parse(input);
  parse("{\"crc32c\":\"" + hex(crc32c(input), 8) + "\",\n" + std::string(input));
  return 0;
}
