// SPDX-License-Identifier: MIT
#include "lm/run_folder.h"

#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lm/error.h"
#include "lm/files.h"

namespace parallax::lm {
namespace {

// "section.key" -> value, both as TOML.
std::map<std::string, std::string> flatten(const Config& config) {
  std::map<std::string, std::string> values;
  std::istringstream lines(to_toml(config));
  std::string section;
  for (std::string line; std::getline(lines, line);) {
    const std::size_t equals = line.find(" = ");
    if (line.starts_with('[')) {
      section = line.substr(1, line.find(']') - 1);
    } else if (equals != std::string::npos) {
      values[section + "." + line.substr(0, equals)] = line.substr(equals + 3);
    }
  }
  return values;
}

bool must_stay(const std::string& key) {
  return key.starts_with("model.") || key == "data.seq_len" || key == "data.seed" ||
         key == "optimizer.name";
}

}  // namespace

bool holds_run(const std::filesystem::path& run) {
  return fs::exists(run / "config.toml") || fs::exists(run / "checkpoints");
}

void write_run_files(const std::filesystem::path& run, const Config& config,
                     const std::vector<Assignment>& assignments) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (const Assignment& assignment : assignments) {
    json.push_back({{"name", assignment.name},
                    {"shape", assignment.shape},
                    {"group", assignment.group},
                    {"blocks", assignment.blocks}});
  }
  write_file(run / "config.toml", to_toml(config));
  write_file(run / "assignments.json", json.dump(2) + "\n");
}

std::vector<std::string> resumable_changes(const Config& before, const Config& after) {
  const auto old_values = flatten(before);
  std::vector<std::string> changes;
  for (const auto& [key, value] : flatten(after)) {
    const std::string& old_value = old_values.at(key);
    if (value == old_value) continue;
    if (must_stay(key)) {
      throw Error("this run was started with " + key + " = " + old_value + ", not " + value +
                  ": go on with its own config, or start another run");
    }
    changes.push_back(key + ": " + old_value + " -> " + value);
  }
  return changes;
}

}  // namespace parallax::lm
