// SPDX-License-Identifier: MIT
#include "lm/sealed_json.h"

#include "lm/checksum.h"
#include "lm/error.h"

namespace parallax::lm {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kOpening = "{\"crc32c\":\"";
constexpr std::string_view kClosing = "\",\n";
constexpr std::size_t kSealBytes = kOpening.size() + 8 + kClosing.size();

std::string seal_of(std::string_view body) {
  return std::string(kOpening) + hex(crc32c(body), 8) + std::string(kClosing);
}

const Json& member(const Json& object, const char* key, const std::string& name) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  if (!object.is_object() || found == object.end()) throw Error(name + ": no \"" + key + "\"");
  return *found;
}

[[noreturn]] void throw_type(const char* key, const char* expected, const std::string& name) {
  throw Error(name + ": \"" + key + "\" is not " + expected);
}

}  // namespace

std::string seal_json(const nlohmann::ordered_json& object) {
  std::string body = object.dump(2).substr(1) + "\n";  // without the opening brace
  return seal_of(body) + body;
}

Json open_sealed_json(std::string_view text, const std::string& name) {
  if (text.size() <= kSealBytes) throw Error(name + ": truncated");
  if (text.substr(0, kSealBytes) != seal_of(text.substr(kSealBytes))) {
    throw Error(name + ": damaged (its checksum does not fit)");
  }
  Json object = Json::parse(text, nullptr, false);
  if (!object.is_object()) throw Error(name + ": not a JSON object");
  return object;
}

std::int64_t get_count(const Json& object, const char* key, const std::string& name) {
  const Json& value = member(object, key, name);
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > INT64_MAX) {
    throw_type(key, "an integer of 0 or more", name);
  }
  return value.get<std::int64_t>();
}

double get_number(const Json& object, const char* key, const std::string& name) {
  const Json& value = member(object, key, name);
  if (!value.is_number()) throw_type(key, "a number", name);
  return value.get<double>();
}

std::string get_string(const Json& object, const char* key, const std::string& name) {
  const Json& value = member(object, key, name);
  if (!value.is_string()) throw_type(key, "a string", name);
  return value.get<std::string>();
}

const Json& get_object(const Json& object, const char* key, const std::string& name) {
  const Json& value = member(object, key, name);
  if (!value.is_object()) throw_type(key, "an object", name);
  return value;
}

}  // namespace parallax::lm
