// SPDX-License-Identifier: MIT
// The safetensors format (https://github.com/huggingface/safetensors): an 8-byte little-endian
// header length, a JSON header, then the bytes of the tensors, row-major, without holes or
// overlaps. Reading trusts nothing: whatever the bytes, the outcome is a valid description or an
// Error. No torch in here; tensor_file.h makes tensors of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace parallax::lm {

inline constexpr std::uint64_t kMaxSafetensorsHeader =
    100'000'000;  // bytes, the format's own limit

struct TensorEntry {
  std::string name;
  std::string dtype;  // "F32", "BF16", "I64", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;  // of its bytes, after the header
  std::uint64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<TensorEntry> tensors;  // by position
  std::map<std::string, std::string> metadata;
  std::uint64_t data_offset = 0;  // where the tensors' bytes begin
};

// Bytes an element of a dtype; 0 where the name is not one of the format's whole-byte types.
std::uint64_t safetensors_dtype_bytes(const std::string& dtype);

// Describes a whole file. Throws Error, led by `name`: truncated, header too long, not the expected
// JSON, a name twice, an unknown dtype, sizes that overflow or do not fit shape and dtype, holes,
// overlaps, bytes left over.
SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& name);

// Length and header for these tensors laid out in order (begin and end are filled in), padded so
// that their bytes start at a multiple of 64.
std::string safetensors_header(std::vector<TensorEntry>& tensors,
                               const std::map<std::string, std::string>& metadata);

}  // namespace parallax::lm
