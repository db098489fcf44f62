// SPDX-License-Identifier: MIT
// TensorBoard's event files, as far as scalars need them: TFRecord framing (length, masked CRC-32C
// of the length, payload, masked CRC-32C of the payload) around Event messages of protocol buffers
// (https://github.com/tensorflow/tensorboard, event.proto and summary.proto).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace parallax::lm {

// What an event file begins with.
std::string event_file_header();

// Appends one scalar; `time` in seconds since 1970.
void append_scalar_event(double time, std::int64_t step, std::string_view tag, float value,
                         std::string& out);

}  // namespace parallax::lm
