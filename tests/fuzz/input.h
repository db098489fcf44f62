// SPDX-License-Identifier: MIT
// What the fuzz targets share. A parser may answer any bytes with a value or with an Error; every
// other outcome (another exception, a sanitizer's report, a hang) is a finding.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "lm/error.h"

namespace parallax::lm {

inline std::string_view as_text(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const char*>(data), size};
}

inline std::span<const std::byte> as_bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

// Runs `parse` and lets an Error pass.
template <typename Parse>
void expect_value_or_error(Parse parse) {
  try {
    parse();
  } catch (const Error&) {
  }
}

}  // namespace parallax::lm
