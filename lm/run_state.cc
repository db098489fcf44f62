// SPDX-License-Identifier: MIT
#include "lm/run_state.h"

#include "lm/checksum.h"
#include "lm/error.h"
#include "lm/sealed_json.h"

namespace parallax::lm {
namespace {

constexpr const char* kFormat = "parallax-checkpoint";
constexpr std::int64_t kVersion = 1;

// Every field once, for writing and for reading.
template <typename State, typename Count, typename Number, typename Text>
void visit(State& state, Count count, Number number, Text text) {
  count("step", state.step);
  count("cursor", state.cursor);
  count("tokens", state.tokens);
  count("skipped", state.skipped);
  number("window_nats", state.window_nats);
  count("window_tokens", state.window_tokens);
  count("window_bytes", state.window_bytes);
  text("rng", state.rng);
  text("config", state.config);
  text("tokenizer", state.tokenizer);
  text("dataset", state.dataset);
  text("parallax", state.parallax);
  text("torch", state.torch);
}

std::uint32_t parse_crc(const std::string& digits, const std::string& name) {
  std::uint64_t value = 0;
  for (const char c : digits) {
    const std::size_t digit = std::string_view("0123456789abcdef").find(c);
    if (digit == std::string_view::npos || digits.size() != 8) {
      throw Error(name + ": \"crc32c\" is not 8 hexadecimal digits");
    }
    value = value * 16 + digit;
  }
  return static_cast<std::uint32_t>(value);
}

}  // namespace

std::string to_json(const RunState& state) {
  nlohmann::ordered_json json = {{"format", kFormat}, {"version", kVersion}};
  const auto put = [&](const char* key, const auto& value) { json[key] = value; };
  visit(state, put, put, put);
  json["files"] = nlohmann::ordered_json::object();
  for (const auto& [file, seal] : state.files) {
    json["files"][file] = {{"bytes", seal.bytes}, {"crc32c", hex(seal.crc32c, 8)}};
  }
  return seal_json(json);
}

RunState parse_run_state(std::string_view text, const std::string& name) {
  const nlohmann::json json = open_sealed_json(text, name);
  if (get_string(json, "format", name) != kFormat || get_count(json, "version", name) != kVersion) {
    throw Error(name + ": not a checkpoint of version " + std::to_string(kVersion));
  }
  RunState state;
  visit(
      state, [&](const char* key, std::int64_t& value) { value = get_count(json, key, name); },
      [&](const char* key, double& value) { value = get_number(json, key, name); },
      [&](const char* key, std::string& value) { value = get_string(json, key, name); });
  for (const auto& [file, seal] : get_object(json, "files", name).items()) {
    state.files[file] = {static_cast<std::uint64_t>(get_count(seal, "bytes", name)),
                         parse_crc(get_string(seal, "crc32c", name), name)};
  }
  return state;
}

}  // namespace parallax::lm
