// SPDX-License-Identifier: MIT
// Progress on stderr: on a terminal one line that is written over, elsewhere plain lines.
#pragma once

#include <string>

namespace parallax::cli {

class LiveLine {
 public:
  LiveLine();
  ~LiveLine();  // leaves a terminal's line standing

  // On a terminal shows every line over the one before; elsewhere prints only the lines to keep.
  void show(const std::string& line, bool keep);
  // A line that stays, above the live one.
  void print(const std::string& line);

 private:
  void clear();

  bool terminal_;
  std::string shown_;
};

std::string format_duration(double seconds);  // "1:02:03", "2:03"; "?" where it is not known

}  // namespace parallax::cli
