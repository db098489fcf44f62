// SPDX-License-Identifier: MIT
// What a user can fix. The message is one line: it names the thing that was wrong and what would be
// right. cli/main.cc prints it and exits with 1; library code never prints.
#pragma once

#include <stdexcept>
#include <string>

namespace parallax::lm {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message) : std::runtime_error(message) {}
};

}  // namespace parallax::lm
