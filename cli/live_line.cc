// SPDX-License-Identifier: MIT
#include "cli/live_line.h"

#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <iostream>

namespace parallax::cli {

LiveLine::LiveLine() : terminal_(::isatty(STDERR_FILENO) == 1) {}

LiveLine::~LiveLine() {
  if (!shown_.empty()) std::cerr << std::endl;
}

void LiveLine::show(const std::string& line, bool keep) {
  if (!terminal_) {
    if (keep) std::cerr << line << std::endl;
    return;
  }
  clear();
  std::cerr << line << std::flush;
  shown_ = line;
}

void LiveLine::print(const std::string& line) {
  const std::string live = shown_;
  clear();
  std::cerr << line << std::endl;
  if (!live.empty()) show(live, false);
}

void LiveLine::clear() {
  if (!shown_.empty()) std::cerr << "\r\033[K";
  shown_.clear();
}

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "?";
  const auto whole = static_cast<long long>(std::ceil(seconds));
  char text[32];
  if (whole >= 3600) {
    std::snprintf(text, sizeof text, "%lld:%02lld:%02lld", whole / 3600, whole / 60 % 60,
                  whole % 60);
  } else {
    std::snprintf(text, sizeof text, "%lld:%02lld", whole / 60, whole % 60);
  }
  return text;
}

}  // namespace parallax::cli
