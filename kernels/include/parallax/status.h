// SPDX-License-Identifier: MIT
// How the kernel room reports failure. Nothing below ops/ throws, prints or exits: every host
// function that can fail returns a Status, and the caller decides what a failure means.
#pragma once

#include <string>
#include <utility>

namespace parallax {

enum class StatusCode {
  kOk,
  kInvalidArgument,  // the call contradicts its own contract; the message names the argument
  kUnsupported,      // a legal call that this device or build has no kernel for
  kDeviceError,      // the CUDA runtime refused; the message carries its words
};

class [[nodiscard]] Status {
 public:
  Status() = default;  // ok
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  static Status invalid_argument(std::string message) {
    return {StatusCode::kInvalidArgument, std::move(message)};
  }
  static Status unsupported(std::string message) {
    return {StatusCode::kUnsupported, std::move(message)};
  }
  static Status device_error(std::string message) {
    return {StatusCode::kDeviceError, std::move(message)};
  }

  bool ok() const { return code_ == StatusCode::kOk; }
  StatusCode code() const { return code_; }
  // Names the argument, what was expected and what came. Empty when ok.
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

}  // namespace parallax
