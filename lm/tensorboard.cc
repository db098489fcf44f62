// SPDX-License-Identifier: MIT
#include "lm/tensorboard.h"

#include <cstring>

#include "lm/checksum.h"

namespace parallax::lm {
namespace {

enum WireType { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

template <typename T>
void append_fixed(T value, std::string& out) {
  char bytes[sizeof value];
  std::memcpy(bytes, &value, sizeof value);
  out.append(bytes, sizeof value);
}

void append_varint(std::uint64_t value, std::string& out) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

void append_tag(int field, WireType type, std::string& out) {
  append_varint(static_cast<std::uint64_t>(field) << 3 | type, out);
}

void append_bytes(int field, std::string_view bytes, std::string& out) {
  append_tag(field, kBytes, out);
  append_varint(bytes.size(), out);
  out += bytes;
}

std::uint32_t masked_crc(std::string_view bytes) {
  const std::uint32_t crc = crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xa282ead8;
}

void append_record(std::string_view payload, std::string& out) {
  std::string length;
  append_fixed<std::uint64_t>(payload.size(), length);
  out += length;
  append_fixed(masked_crc(length), out);
  out += payload;
  append_fixed(masked_crc(payload), out);
}

}  // namespace

std::string event_file_header() {
  std::string event;  // Event { wall_time = 1, file_version = 3 }
  append_tag(1, kFixed64, event);
  append_fixed(0.0, event);
  append_bytes(3, "brain.Event:2", event);
  std::string out;
  append_record(event, out);
  return out;
}

void append_scalar_event(double time, std::int64_t step, std::string_view tag, float value,
                         std::string& out) {
  std::string scalar;  // Summary.Value { tag = 1, simple_value = 2 }
  append_bytes(1, tag, scalar);
  append_tag(2, kFixed32, scalar);
  append_fixed(value, scalar);
  std::string summary;  // Summary { value = 1 }
  append_bytes(1, scalar, summary);
  std::string event;  // Event { wall_time = 1, step = 2, summary = 5 }
  append_tag(1, kFixed64, event);
  append_fixed(time, event);
  append_tag(2, kVarint, event);
  append_varint(static_cast<std::uint64_t>(step), event);
  append_bytes(5, summary, event);
  append_record(event, out);
}

}  // namespace parallax::lm
