// SPDX-License-Identifier: MIT
#include "lm/chart.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>

#include "lm/utf8.h"

namespace parallax::lm {
namespace {

constexpr double kFontSize = 12;
constexpr double kCharacterWidth = 7.8;  // of the page's bold sans-serif at kFontSize, rather wide
constexpr double kLabelHeight = 15;

struct Range {
  double low = 0, high = 1;
};

// The frame's inner rectangle and the two maps from values to coordinates.
struct Frame {
  double left, top, right, bottom;
  Range x_range, y_range;
  bool y_log;

  double x(double value) const {
    return left + (value - x_range.low) / (x_range.high - x_range.low) * (right - left);
  }
  double y(double value) const {
    const auto scaled = [this](double v) { return y_log ? std::log(v) : v; };
    const double fraction =
        (scaled(value) - scaled(y_range.low)) / (scaled(y_range.high) - scaled(y_range.low));
    return bottom - fraction * (bottom - top);
  }
};

std::string fixed(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f", value);
  return text;
}

std::string text_element(double x, double y, const std::string& attributes,
                         const std::string& text) {
  return "<text x='" + fixed(x) + "' y='" + fixed(y) + "' " + attributes + ">" + escape_html(text) +
         "</text>";
}

std::string line_element(double x1, double y1, double x2, double y2, const std::string& color) {
  return "<line x1='" + fixed(x1) + "' y1='" + fixed(y1) + "' x2='" + fixed(x2) + "' y2='" +
         fixed(y2) + "' stroke='" + color + "'/>";
}

std::vector<Series> drawable(const std::vector<Series>& series, bool y_log) {
  std::vector<Series> kept = series;
  for (Series& one : kept) {
    std::erase_if(one.points, [&](const auto& point) {
      return !std::isfinite(point.first) || !std::isfinite(point.second) ||
             (y_log && point.second <= 0);
    });
  }
  std::erase_if(kept, [](const Series& one) { return one.points.empty(); });
  return kept;
}

template <typename Coordinate>
Range range_of(const std::vector<Series>& series, Coordinate coordinate) {
  Range range{INFINITY, -INFINITY};
  for (const Series& one : series) {
    for (const auto& point : one.points) {
      range.low = std::min(range.low, coordinate(point));
      range.high = std::max(range.high, coordinate(point));
    }
  }
  if (range.low == range.high) {  // one value: open the range around it
    const double margin = std::max(std::abs(range.low) * 0.1, 1e-9);
    range.high += margin;
    range.low -= range.low > 0 ? std::min(margin, range.low / 2) : margin;
  }
  return range;
}

Range padded(Range range, bool log) {
  if (log) {
    const double factor = std::pow(range.high / range.low, 0.04);
    return {range.low / factor, range.high * factor};
  }
  const double margin = (range.high - range.low) * 0.06;
  return {range.low - margin, range.high + margin};
}

double label_column_width(const std::vector<Series>& series) {
  std::size_t longest = 0;
  for (const Series& one : series) {
    if (one.style == SeriesStyle::kMarked) longest = std::max(longest, one.label.size());
  }
  return longest * kCharacterWidth + 14;
}

Frame make_frame(const Axes& axes, const std::vector<Series>& series) {
  Frame frame;
  frame.left = 52;
  frame.top = 26;
  frame.bottom = axes.height - 42.0;
  frame.right = axes.width - (axes.direct_labels ? label_column_width(series) : 14.0);
  frame.x_range = range_of(series, [](const auto& point) { return point.first; });
  if (frame.x_range.low > 0 && frame.x_range.low < 0.2 * frame.x_range.high) frame.x_range.low = 0;
  frame.y_range = range_of(series, [](const auto& point) { return point.second; });
  if (axes.y_zero_line) {
    frame.y_range = {std::min(0.0, frame.y_range.low), std::max(0.0, frame.y_range.high)};
  }
  frame.y_range = padded(frame.y_range, axes.y_log);
  frame.y_log = axes.y_log;
  return frame;
}

std::string draw_axes(const Axes& axes, const Frame& frame) {
  std::string out;
  const int x_ticks = std::max(3, static_cast<int>((frame.right - frame.left) / 90));
  for (double tick : round_ticks(frame.y_range.low, frame.y_range.high, 6, frame.y_log)) {
    const bool strong = axes.y_zero_line && tick == 0;
    out += line_element(frame.left, frame.y(tick), frame.right, frame.y(tick),
                        strong ? "var(--faint)" : "var(--grid)");
    out += text_element(frame.left - 7, frame.y(tick) + 4, "text-anchor='end' class='tick'",
                        short_number(tick));
  }
  for (double tick : round_ticks(frame.x_range.low, frame.x_range.high, x_ticks, false)) {
    out +=
        line_element(frame.x(tick), frame.bottom, frame.x(tick), frame.bottom + 5, "var(--faint)");
    out += text_element(frame.x(tick), frame.bottom + 19, "text-anchor='middle' class='tick'",
                        short_number(tick));
  }
  out += line_element(frame.left, frame.bottom, frame.right, frame.bottom, "var(--faint)");
  out += text_element((frame.left + frame.right) / 2, axes.height - 5.0,
                      "text-anchor='middle' class='axis'", axes.x_label);
  out += text_element(2, 14, "class='axis'", axes.y_label);
  return out;
}

std::string draw_line(const Frame& frame, const Series& series) {
  const bool faint = series.style == SeriesStyle::kFaint;
  const std::string color = "var(--run-" + std::to_string(series.color) + ")";
  std::string path, markers;
  for (const auto& [x, y] : series.points) {
    const std::string at_x = fixed(frame.x(x)), at_y = fixed(frame.y(y));
    path += (path.empty() ? "M" : "L") + at_x + " " + at_y;
    if (!faint) markers += "<circle cx='" + at_x + "' cy='" + at_y + "' r='2.6'/>";
  }
  return "<path d='" + path + "' fill='none' stroke='" + color + "' stroke-linejoin='round' " +
         (faint ? "stroke-width='1' stroke-opacity='.45'" : "stroke-width='2'") + "/><g fill='" +
         color + "'>" + markers + "</g>";
}

// Pushes label positions apart: in order of height, each at least a line below the one above, then
// all moved up together where they ran out of the frame.
std::vector<double> spread_labels(std::vector<double> wanted, double bottom) {
  std::vector<std::size_t> order(wanted.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return wanted[a] < wanted[b]; });
  for (std::size_t i = 1; i < order.size(); ++i) {
    wanted[order[i]] = std::max(wanted[order[i]], wanted[order[i - 1]] + kLabelHeight);
  }
  double limit = bottom;
  for (std::size_t i = order.size(); i-- > 0; limit = wanted[order[i]] - kLabelHeight) {
    wanted[order[i]] = std::min(wanted[order[i]], limit);
  }
  return wanted;
}

std::string draw_labels(const Frame& frame, const std::vector<Series>& series) {
  std::vector<const Series*> marked;
  std::vector<double> heights;
  for (const Series& one : series) {
    if (one.style != SeriesStyle::kMarked) continue;
    marked.push_back(&one);
    heights.push_back(frame.y(one.points.back().second) + 4);
  }
  heights = spread_labels(heights, frame.bottom);
  std::string out;
  for (std::size_t i = 0; i < marked.size(); ++i) {
    out +=
        text_element(frame.right + 9, heights[i],
                     "fill='var(--run-" + std::to_string(marked[i]->color) + ")' font-weight='600'",
                     marked[i]->label);
  }
  return out;
}

std::vector<double> linear_ticks(double low, double high, int wanted) {
  const double rough = (high - low) / std::max(1, wanted);
  const double decade = std::pow(10.0, std::floor(std::log10(rough)));
  double step = 10 * decade;
  for (double multiple : {5.0, 2.0, 1.0}) {
    if (multiple * decade >= rough) step = multiple * decade;
  }
  std::vector<double> ticks;
  const auto last = static_cast<std::int64_t>(std::floor(high / step + 1e-9));
  for (auto i = static_cast<std::int64_t>(std::ceil(low / step - 1e-9)); i <= last; ++i) {
    ticks.push_back(i * step);
  }
  return ticks;
}

}  // namespace

std::vector<double> round_ticks(double low, double high, int wanted, bool log) {
  if (!log) return linear_ticks(low, high, wanted);
  std::vector<double> ticks;
  for (double decade = std::pow(10.0, std::floor(std::log10(low))); decade <= high; decade *= 10) {
    for (double multiple : {1.0, 2.0, 5.0}) {
      const double tick = multiple * decade;
      if (tick >= low && tick <= high) ticks.push_back(tick);
    }
  }
  return ticks.size() >= 3 ? ticks : linear_ticks(low, high, wanted);
}

std::string short_number(double value) {
  const double magnitude = std::abs(value);
  char text[32];
  if (magnitude < 1e-12) return "0";
  static constexpr struct {
    double unit;
    const char* suffix;
  } kUnits[] = {{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e3, "k"}};
  for (const auto& [unit, suffix] : kUnits) {
    if (magnitude < unit * 0.99995) continue;
    std::snprintf(text, sizeof(text), "%.3g%s", value / unit, suffix);
    return text;
  }
  std::snprintf(text, sizeof(text), "%.3g", value);
  return text;
}

std::string grouped_digits(std::int64_t value) {
  std::string digits = std::to_string(value);
  const std::size_t first = digits.front() == '-' ? 1 : 0;
  for (std::size_t at = digits.size(); at > first + 3;) digits.insert(at -= 3, ",");
  return digits;
}

std::string escape_html(const std::string& text) {
  std::string out;
  for (char character : to_utf8(text)) {
    const auto byte = static_cast<unsigned char>(character);
    if (byte == 0x7F || (byte < 0x20 && byte != '\n' && byte != '\t')) {
      out += "\xEF\xBF\xBD";
    } else if (byte == '&') {
      out += "&amp;";
    } else if (byte == '<') {
      out += "&lt;";
    } else if (byte == '>') {
      out += "&gt;";
    } else if (byte == '"') {
      out += "&quot;";
    } else if (byte == '\'') {
      out += "&#39;";
    } else {
      out += character;
    }
  }
  return out;
}

std::string line_chart(const Axes& axes, const std::vector<Series>& series) {
  const std::string width = std::to_string(axes.width), height = std::to_string(axes.height);
  std::string out = "<svg viewBox='0 0 " + width + " " + height + "' width='" + width +
                    "' height='" + height + "' role='img' aria-label='" + escape_html(axes.title) +
                    "' font-size='" + fixed(kFontSize) + "'>";
  const std::vector<Series> drawn = drawable(series, axes.y_log);
  if (drawn.empty()) {
    return out +
           text_element(axes.width / 2.0, axes.height / 2.0, "text-anchor='middle'",
                        "no points to draw") +
           "</svg>";
  }
  const Frame frame = make_frame(axes, drawn);
  out += draw_axes(axes, frame);
  for (const Series& one : drawn) out += draw_line(frame, one);
  if (axes.direct_labels) out += draw_labels(frame, drawn);
  return out + "</svg>";
}

}  // namespace parallax::lm
