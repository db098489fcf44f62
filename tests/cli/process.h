// SPDX-License-Identifier: MIT
// Runs the binary under test the way a user does.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

namespace parallax::cli {

struct Outcome {
  int exit_code = -1;
  std::string out, err;
};

// Runs `parallax ARGUMENTS...` in the current folder and waits for it.
Outcome run_parallax(const std::vector<std::string>& arguments);

// A folder of its own, deleted at the end.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

std::string read_text(const std::filesystem::path& path);
void write_text(const std::filesystem::path& path, const std::string& text);

}  // namespace parallax::cli
