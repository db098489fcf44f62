// SPDX-License-Identifier: MIT
// JSON objects that notice damage. The first line of the text is {"crc32c":"xxxxxxxx", and covers
// every byte after that line; the whole remains plain JSON. Includes nlohmann: for .cc files only.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace parallax::lm {

std::string seal_json(const nlohmann::ordered_json& object);

// Throws Error naming `name` where the text is no sealed JSON object or has been changed.
nlohmann::json open_sealed_json(std::string_view text, const std::string& name);

// object[key] as a T. Throws Error naming `name` and the key where it is missing or no T.
std::int64_t get_count(const nlohmann::json& object, const char* key,
                       const std::string& name);  // an integer >= 0
double get_number(const nlohmann::json& object, const char* key, const std::string& name);
std::string get_string(const nlohmann::json& object, const char* key, const std::string& name);
const nlohmann::json& get_object(const nlohmann::json& object, const char* key,
                                 const std::string& name);

}  // namespace parallax::lm
