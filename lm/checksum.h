// SPDX-License-Identifier: MIT
// CRC-32C (Castagnoli) guards every file format of this room: it finds any damage of up to 32
// consecutive bits, and TensorBoard's event files use it too. hash64 tells contents apart where
// nobody is hostile (which documents are equal, which tokenizer made this data).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace parallax::lm {

// The checksum of a, then b, is crc32c(b, crc32c(a)).
std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t crc = 0);
std::uint32_t crc32c(std::string_view bytes, std::uint32_t crc = 0);

std::uint64_t hash64(std::string_view bytes, std::uint64_t seed = 0);

// A bijection of 64-bit values without pattern (the finalizer of SplitMix64).
std::uint64_t mix64(std::uint64_t x);

std::string hex(std::uint64_t value, int digits);

}  // namespace parallax::lm
