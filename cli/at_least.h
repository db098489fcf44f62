// SPDX-License-Identifier: MIT
// What an option's number must not be below.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

namespace parallax::cli {

// Says "must be at least LOW, got ...". What is no number at all is left to the conversion, which
// names it too.
inline CLI::Validator at_least(std::int64_t low) {
  const auto check = [low](const std::string& text) {
    double value = 0;
    const bool fits = !CLI::detail::lexical_cast(text, value) || value >= static_cast<double>(low);
    return fits ? std::string() : "must be at least " + std::to_string(low) + ", got " + text;
  };
  return CLI::Validator(check, ">= " + std::to_string(low));
}

}  // namespace parallax::cli
