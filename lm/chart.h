// SPDX-License-Identifier: MIT
// Line charts as inline SVG. Colours are CSS variables (--run-0, --run-1, ... for series; --ink,
// --faint, --grid for the frame), so the page decides them for light and dark once for all charts.
// Every label is escaped here.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace parallax::lm {

enum class SeriesStyle {
  kFaint,   // a thin pale line, for noisy curves
  kMarked,  // a strong line with a marker on each point and its label at the last one
};

struct Series {
  std::string label;  // shown at the end of kMarked series
  int color = 0;      // index of the run
  SeriesStyle style = SeriesStyle::kMarked;
  std::vector<std::pair<double, double>> points;  // x ascending; non-finite points are left out
};

struct Axes {
  std::string title;  // for screen readers
  std::string x_label, y_label;
  bool y_log = false;         // then only points with y > 0 are drawn
  bool y_zero_line = false;   // draws y = 0 stronger, and makes room for it
  bool direct_labels = true;  // names kMarked series at their last point; takes room at the right
  int width = 824, height = 400;  // of the SVG's own coordinates, in CSS pixels
};

// An <svg> element. With no point to draw it says so in the middle of an empty frame.
std::string line_chart(const Axes& axes, const std::vector<Series>& series);

// Positions of ticks in [low, high] at round numbers (1, 2, 5 times powers of ten), at most about
// `wanted` of them; on a logarithmic axis 1, 2, 5 of each decade, or linear ones when the range
// spans too little for them. REQUIRES: low < high, and low > 0 if `log`.
std::vector<double> round_ticks(double low, double high, int wanted, bool log);

// A number for people: 1234567 -> "1.23M", 0.00321 -> "0.00321", 2.5 -> "2.5".
std::string short_number(double value);

// 1234567 -> "1,234,567".
std::string grouped_digits(std::int64_t value);

// Text as HTML text or attribute value: & < > " ' escaped, control characters and bytes that are
// not UTF-8 replaced by U+FFFD.
std::string escape_html(const std::string& text);

}  // namespace parallax::lm
