// SPDX-License-Identifier: MIT
#include <cstdlib>

#include "lm/safetensors.h"
#include "tests/fuzz/input.h"

namespace parallax::lm {
namespace {

// What was accepted must be safe to read: in order, inside the file, as long as its shape says.
void check(const SafetensorsHeader& header, std::size_t file_bytes) {
  std::uint64_t position = 0;
  for (const TensorEntry& tensor : header.tensors) {
    std::uint64_t bytes = safetensors_dtype_bytes(tensor.dtype);
    for (const std::int64_t size : tensor.shape) bytes *= static_cast<std::uint64_t>(size);
    if (tensor.begin != position || tensor.end - tensor.begin != bytes) std::abort();
    position = tensor.end;
  }
  if (header.data_offset + position != file_bytes) std::abort();
}

void parse(std::string_view file) {
  expect_value_or_error([&] { check(parse_safetensors(as_bytes(file), "input"), file.size()); });
}

}  // namespace
}  // namespace parallax::lm

// The input as a whole file, and as a header with a right length before it and data behind it.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input = parallax::lm::as_text(data, size);
  parallax::lm::parse(input);
  if (size == 0) return 0;
  const std::string header(input.substr(1));
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i)
    file[static_cast<std::size_t>(i)] = static_cast<char>(header.size() >> (8 * i));
  parallax::lm::parse(file + header + std::string(data[0], 'd'));
  return 0;
}
