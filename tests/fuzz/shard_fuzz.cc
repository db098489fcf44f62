// SPDX-License-Identifier: MIT
#include <vector>

#include "lm/checksum.h"
#include "lm/shard.h"
#include "tests/fuzz/input.h"

namespace parallax::lm {
namespace {

void read_all(std::string_view file) {
  expect_value_or_error([&] {
    const Shard shard(as_bytes(file), "input");
    std::vector<std::int64_t> tokens(static_cast<std::size_t>(shard.size()));
    shard.content_crc32c();
    shard.read(0, shard.size(), 300, tokens.data());
  });
}

void put(std::string& file, std::size_t at, std::uint32_t value) {
  for (std::size_t i = 0; i < 4; ++i) file[at + i] = static_cast<char>(value >> (8 * i));
}

}  // namespace
}  // namespace parallax::lm

// The input as a shard, then with the checksums of header and of a single block made right, so that
// what lies behind them is reached too.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace parallax::lm;
  std::string file(as_text(data, size));
  read_all(file);
  if (size < 32) return 0;
  put(file, 28, crc32c(std::string_view(file).substr(0, 28)));
  read_all(file);
  if (size < 36) return 0;
  put(file, size - 4, crc32c(std::string_view(file).substr(32, size - 36)));
  read_all(file);
  return 0;
}
