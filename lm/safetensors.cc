// SPDX-License-Identifier: MIT
#include "lm/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <string_view>

#include "lm/error.h"

namespace parallax::lm {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kMaxRank = 64;
constexpr const char* kMetadata = "__metadata__";

// Takes the header's events as they come and accepts nothing but the one structure it may have, so
// that a hostile header is refused at its first strange value and never becomes a tree in memory.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit HeaderReader(SafetensorsHeader& header) : header_(header) {}

  const std::string& problem() const { return problem_; }

  bool start_object(std::size_t) override {
    if (in_array_ || depth_ == 2 || (depth_ == 1 && key_.empty())) return refuse("a nested object");
    if (++depth_ == 1) return true;
    in_metadata_ = key_ == kMetadata;
    if (!in_metadata_) header_.tensors.push_back({key_, {}, {}, 0, 0});
    seen_.clear();
    return true;
  }

  bool end_object() override {
    if (depth_-- == 1) return true;
    if (!in_metadata_ && seen_.size() != 3) {
      return refuse("tensor '" + header_.tensors.back().name +
                    "' lacks one of dtype, shape, data_offsets");
    }
    in_metadata_ = false;
    return true;
  }

  bool key(string_t& name) override {
    key_ = name;
    if (depth_ == 1) return names_.insert(name).second || refuse("'" + name + "' appears twice");
    if (!seen_.insert(name).second) return refuse("key '" + name + "' appears twice");
    if (in_metadata_ || name == "dtype" || name == "shape" || name == "data_offsets") return true;
    return refuse("unknown key '" + name + "'");
  }

  bool string(string_t& value) override {
    if (depth_ != 2 || in_array_) return refuse("a string where none belongs");
    if (in_metadata_) {
      header_.metadata[key_] = value;
      return true;
    }
    if (key_ != "dtype") return refuse("a string as " + key_);
    header_.tensors.back().dtype = value;
    return true;
  }

  bool start_array(std::size_t) override {
    if (depth_ != 2 || in_array_ || in_metadata_ || key_ == "dtype") {
      return refuse("an array where none belongs");
    }
    in_array_ = true;
    offsets_ = 0;
    return true;
  }

  bool end_array() override {
    in_array_ = false;
    return key_ == "shape" || offsets_ == 2 || refuse("data_offsets without two numbers");
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (!in_array_) return refuse("a number where none belongs");
    if (value > INT64_MAX) return refuse("a number beyond 64 bits");
    TensorEntry& tensor = header_.tensors.back();
    if (key_ == "shape") {
      if (tensor.shape.size() == kMaxRank) return refuse("a shape of more than 64 dimensions");
      tensor.shape.push_back(static_cast<std::int64_t>(value));
      return true;
    }
    if (offsets_ == 2) return refuse("data_offsets of more than two numbers");
    (offsets_++ == 0 ? tensor.begin : tensor.end) = value;
    return true;
  }

  bool null() override { return refuse("null"); }
  bool boolean(bool) override { return refuse("a boolean"); }
  bool number_integer(number_integer_t) override { return refuse("a negative number"); }
  bool number_float(number_float_t, const string_t&) override { return refuse("a fraction"); }
  bool binary(binary_t&) override { return refuse("binary data"); }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception&) override {
    return refuse("bad JSON at byte " + std::to_string(position));
  }

 private:
  bool refuse(std::string problem) {
    if (problem_.empty()) problem_ = std::move(problem);
    return false;
  }

  SafetensorsHeader& header_;
  std::string problem_;
  std::set<std::string> names_;  // of tensors, and __metadata__
  std::set<std::string> seen_;   // keys of the object at depth 2
  std::string key_;
  int depth_ = 0;
  int offsets_ = 0;
  bool in_array_ = false;
  bool in_metadata_ = false;
};

// The bytes that shape and dtype ask for; false where they overflow 63 bits.
bool byte_count(const TensorEntry& tensor, std::uint64_t element_bytes, std::uint64_t& bytes) {
  if (std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end()) {
    bytes = 0;
    return true;
  }
  bytes = element_bytes;
  for (const std::int64_t size : tensor.shape) {
    if (bytes > INT64_MAX / static_cast<std::uint64_t>(size)) return false;
    bytes *= static_cast<std::uint64_t>(size);
  }
  return true;
}

// Positions ascending from 0 to data_bytes, each tensor as long as its shape and dtype ask for.
void check_layout(std::vector<TensorEntry>& tensors, std::uint64_t data_bytes,
                  const std::string& name) {
  std::sort(tensors.begin(), tensors.end(), [](const TensorEntry& a, const TensorEntry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::uint64_t position = 0;
  for (const TensorEntry& tensor : tensors) {
    const std::string which = name + ": tensor '" + tensor.name + "' ";
    const std::uint64_t element_bytes = safetensors_dtype_bytes(tensor.dtype);
    if (element_bytes == 0) throw Error(which + "has the unknown dtype '" + tensor.dtype + "'");
    std::uint64_t bytes = 0;
    if (!byte_count(tensor, element_bytes, bytes)) throw Error(which + "has too large a shape");
    if (tensor.begin != position) throw Error(which + "overlaps its neighbour or leaves a hole");
    if (tensor.end < tensor.begin || tensor.end - tensor.begin != bytes) {
      throw Error(which + "has data_offsets that do not fit its shape and dtype");
    }
    if (tensor.end > data_bytes) throw Error(which + "ends beyond the file: truncated");
    position = tensor.end;
  }
  if (position != data_bytes) {
    throw Error(name + ": " + std::to_string(data_bytes - position) +
                " bytes after the last tensor");
  }
}

}  // namespace

std::uint64_t safetensors_dtype_bytes(const std::string& dtype) {
  static const std::map<std::string, std::uint64_t> kBytes = {
      {"F64", 8},     {"I64", 8},     {"U64", 8},  {"F32", 4}, {"I32", 4},
      {"U32", 4},     {"F16", 2},     {"BF16", 2}, {"I16", 2}, {"U16", 2},
      {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I8", 1},   {"U8", 1},  {"BOOL", 1}};
  const auto found = kBytes.find(dtype);
  return found == kBytes.end() ? 0 : found->second;
}

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& name) {
  if (file.size() < kLengthBytes) throw Error(name + ": too short for a safetensors file");
  std::uint64_t length = 0;
  for (std::size_t i = kLengthBytes; i-- > 0;) {
    length = length << 8 | std::to_integer<std::uint64_t>(file[i]);
  }
  if (length > kMaxSafetensorsHeader) {
    throw Error(name + ": header of " + std::to_string(length) + " bytes, the limit is " +
                std::to_string(kMaxSafetensorsHeader));
  }
  if (length > file.size() - kLengthBytes) throw Error(name + ": truncated inside its header");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  if (!text.starts_with('{')) throw Error(name + ": the header does not begin with '{'");

  SafetensorsHeader header;
  HeaderReader reader(header);
  if (!nlohmann::json::sax_parse(text, &reader)) {
    throw Error(name + ": bad header: " + reader.problem());
  }
  header.data_offset = kLengthBytes + length;
  check_layout(header.tensors, file.size() - header.data_offset, name);
  return header;
}

std::string safetensors_header(std::vector<TensorEntry>& tensors,
                               const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json[kMetadata] = metadata;
  std::uint64_t position = 0;
  for (TensorEntry& tensor : tensors) {
    std::uint64_t bytes = 0;
    if (!byte_count(tensor, safetensors_dtype_bytes(tensor.dtype), bytes) ||
        json.contains(tensor.name)) {
      throw Error("cannot write tensor '" + tensor.name + "': named twice, or too large");
    }
    tensor.begin = position;
    tensor.end = position += bytes;
    json[tensor.name] = {{"dtype", tensor.dtype},
                         {"shape", tensor.shape},
                         {"data_offsets", {tensor.begin, tensor.end}}};
  }
  std::string text = json.dump();
  text.resize(
      (kLengthBytes + text.size() + kAlignment - 1) / kAlignment * kAlignment - kLengthBytes, ' ');
  std::string header(kLengthBytes, '\0');
  for (std::size_t i = 0; i < kLengthBytes; ++i) {
    header[i] = static_cast<char>(text.size() >> (8 * i) & 255);
  }
  return header + text;
}

}  // namespace parallax::lm
