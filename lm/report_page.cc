// SPDX-License-Identifier: MIT
// The report as one HTML page: style, charts and pictures are inside it; no script, no network.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <iterator>
#include <map>
#include <string_view>
#include <utility>

#include "lm/chart.h"
#include "lm/heat_map.h"
#include "lm/report.h"

namespace parallax::lm {
namespace {

constexpr int kNumColors = 8;
constexpr std::size_t kCurvePoints = 240;  // of a training curve, after averaging
constexpr std::size_t kDifferencePoints = 40;

constexpr char kStyle[] = R"css(
:root { color-scheme: light dark;
  --paper: #fcfbf9; --card: #ffffff; --ink: #202226; --soft: #5d6168; --faint: #9b9ea3; --grid: #e6e4df;
  --run-0: #66707f; --run-1: #1273a8; --run-2: #cf4a0c; --run-3: #2f855a; --run-4: #8a4fbf;
  --run-5: #b7791f; --run-6: #c2366f; --run-7: #0e7c86; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #17181b; --card: #1e2023; --ink: #e6e4e0; --soft: #a8abb1; --faint: #74777d; --grid: #34363b;
  --run-0: #a3adbb; --run-1: #58b1e0; --run-2: #ff8a4c; --run-3: #68c595; --run-4: #bd8ef0;
  --run-5: #e0b155; --run-6: #f07ba9; --run-7: #4fc3cd; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: .2rem 0 .6rem; }
h2 { font-size: 1.25rem; font-weight: 650; letter-spacing: -.005em; margin: 3rem 0 .5rem; padding-top: .9rem;
  border-top: 1px solid var(--grid); }
h3 { font-size: 1rem; font-weight: 600; margin: 1.8rem 0 .1rem; }
p { margin: .5rem 0; max-width: 42rem; }
.eyebrow { color: var(--soft); font-size: .8rem; letter-spacing: .06em; text-transform: uppercase; margin: 0; }
.soft, figcaption, .remarks { color: var(--soft); font-size: .9rem; }
.remarks { padding-left: 1.1rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { padding: .45rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { font-weight: 500; color: var(--soft); font-size: .82rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; }
.swatch { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%; margin-right: .5rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; margin: .8rem 0 .2rem; }
svg { display: block; max-width: 100%; height: auto; font-family: inherit; fill: var(--ink); }
svg .tick, svg .axis { fill: var(--soft); }
.narrow { display: none; } .narrow svg { width: 100%; }
.heads { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .9rem; margin: .5rem 0 1rem; }
figure { margin: 0; }
.heads img { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; background: var(--card);
  border: 1px solid var(--grid); }
figcaption { line-height: 1.35; margin-top: .3rem; font-size: .82rem; }
.bar { width: 100%; max-width: 30rem; margin: 1rem 0 1.2rem; }
.bar img { display: block; width: 100%; height: .9rem; image-rendering: pixelated; background: var(--card);
  border: 1px solid var(--grid); }
.bar div { position: relative; height: 1.3rem; font-size: .78rem; color: var(--soft); }
.bar span { position: absolute; transform: translateX(-50%); }
pre { font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; background: var(--card);
  border: 1px solid var(--grid); border-radius: 4px; padding: .8rem 1rem; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: .6rem 0; }
pre b { font-weight: 600; color: var(--soft); }
details { margin: .5rem 0; } summary { cursor: pointer; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
@media (max-width: 46rem) {
  body { font-size: 15px; } main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  .wide { display: none; } .narrow { display: block; } .heads { gap: .4rem; } figcaption { font-size: .72rem; } }
@media print { details > * { display: block; } }
)css";

std::string format(const char* pattern, double value) {
  if (!std::isfinite(value)) return "-";
  char text[64];
  std::snprintf(text, sizeof(text), pattern, value);
  const std::string_view digits(text);
  const bool is_zero = digits.find_first_not_of("-0.") == std::string_view::npos;
  return std::string(is_zero && digits.starts_with('-') ? digits.substr(1) : digits);
}

std::string element(const std::string& tag, const std::string& inner) {
  const std::string name = tag.substr(0, tag.find(' '));
  return "<" + tag + ">" + inner + "</" + name + ">";
}

std::string swatch(int run) {
  return "<span class='swatch' style='background:var(--run-" + std::to_string(run % kNumColors) +
         ")'></span>";
}

std::string legend(const Report& report) {
  std::string items;
  for (std::size_t i = 0; i < report.runs.size(); ++i) {
    items += element("span", swatch(static_cast<int>(i)) + escape_html(report.runs[i].name));
  }
  return element("div class='legend'", items);
}

// The same chart for a wide and for a narrow window; the style shows one.
std::string chart(Axes axes, const std::vector<Series>& series) {
  std::string out = element("div class='wide'", line_chart(axes, series));
  axes.width = 350;
  axes.height = 300;
  axes.direct_labels = false;
  return out + element("div class='narrow'", line_chart(axes, series));
}

using Points = std::vector<std::pair<double, double>>;  // tokens, bits per byte

Points curve(const ReportedRun& run, const std::string& kind) {
  Points points;
  for (const MetricsRecord& record : run.metrics) {
    if (record.kind == kind) points.emplace_back(record.tokens, record.bits_per_byte);
  }
  return points;
}

// Means over equal stretches, so that a curve has at most `most` points.
Points averaged(const Points& points, std::size_t most) {
  const std::size_t stretch = (points.size() + most - 1) / most;
  Points means;
  for (std::size_t begin = 0; begin < points.size(); begin += stretch) {
    const std::size_t end = std::min(begin + stretch, points.size());
    double x = 0, y = 0;
    for (std::size_t i = begin; i < end; ++i) {
      x += points[i].first;
      y += points[i].second;
    }
    means.emplace_back(x / static_cast<double>(end - begin), y / static_cast<double>(end - begin));
  }
  return means;
}

// run - baseline where both have a value at the same number of tokens.
Points difference(const Points& run, const Points& baseline) {
  const std::map<double, double> at(baseline.begin(), baseline.end());
  Points points;
  for (const auto& [x, y] : run) {
    const auto other = at.find(x);
    if (other != at.end()) points.emplace_back(x, y - other->second);
  }
  return points;
}

std::string loss_chart(const Report& report) {
  std::vector<Series> series;
  for (std::size_t i = 0; i < report.runs.size(); ++i) {
    const ReportedRun& run = report.runs[i];
    const int color = static_cast<int>(i) % kNumColors;
    series.push_back(
        {run.name, color, SeriesStyle::kFaint, averaged(curve(run, "train"), kCurvePoints)});
    series.push_back({run.name, color, SeriesStyle::kMarked, curve(run, "eval")});
  }
  Axes axes;
  axes.title = "Training and validation bits per byte over tokens";
  axes.x_label = "training tokens";
  axes.y_label = "bits per byte (logarithmic)";
  axes.y_log = true;
  return chart(axes, series);
}

// How every other run differs from the first; empty where no two can be compared point by point.
std::string difference_chart(const Report& report) {
  std::vector<Series> series;
  const ReportedRun& baseline = report.runs.front();
  for (std::size_t i = 1; i < report.runs.size(); ++i) {
    const ReportedRun& run = report.runs[i];
    const int color = static_cast<int>(i) % kNumColors;
    // The start, where all runs fall steeply, would set the scale.
    Points train = difference(curve(run, "train"), curve(baseline, "train"));
    train.erase(train.begin(), train.begin() + static_cast<std::ptrdiff_t>(train.size() / 10));
    series.push_back({run.name, color, SeriesStyle::kFaint, averaged(train, kDifferencePoints)});
    series.push_back({run.name, color, SeriesStyle::kMarked,
                      difference(curve(run, "eval"), curve(baseline, "eval"))});
  }
  const bool empty = std::all_of(series.begin(), series.end(),
                                 [](const Series& one) { return one.points.empty(); });
  if (empty) return "";
  Axes axes;
  axes.title = "Bits per byte minus those of " + baseline.name;
  axes.x_label = "training tokens";
  axes.y_label = "bits per byte minus " + baseline.name + " (below 0 is better)";
  axes.y_zero_line = true;
  axes.height = 300;
  return element("h3", "Difference from " + escape_html(baseline.name)) + chart(axes, series);
}

std::string summary_row(const ReportedRun& run, int color) {
  std::string row = element("td", swatch(color) + escape_html(run.name));
  row += element("td", format("%.4f", validation_bits_per_byte(run)));
  row += element("td", grouped_digits(run.parameters));
  row += element("td", short_number(run.forward_flops_per_token));
  row += element("td", short_number(run.training_flops_per_token));
  row += element("td", grouped_digits(std::llround(run.tokens_per_s)));
  return element("tr", row);
}

std::string table(const std::vector<std::string>& heads, const std::string& rows) {
  std::string head;
  for (const std::string& one : heads) head += element("th scope='col'", one);
  return element("div class='scroll'",
                 element("table", element("thead", element("tr", head)) + element("tbody", rows)));
}

std::string summary_section(const Report& report) {
  std::string rows;
  for (std::size_t i = 0; i < report.runs.size(); ++i) {
    rows += summary_row(report.runs[i], static_cast<int>(i));
  }
  std::string out = element("h2", "Result");
  out += table({"run", "validation<br>bits per byte", "parameters", "forward FLOPs<br>per token",
                "training FLOPs<br>per token", "tokens/s<br>in training"},
               rows);
  std::string remarks;
  for (const std::string& remark : report.remarks) remarks += element("li", escape_html(remark));
  if (!remarks.empty()) out += element("ul class='remarks'", remarks);
  return out;
}

std::string loss_section(const Report& report) {
  return element("h2", "Loss") + legend(report) + loss_chart(report) +
         element("p class='soft'",
                 "Thick lines with markers: the evaluations on held-out documents during training "
                 "(a fixed part of them; the table has the whole). Thin lines: training batches.") +
         (report.runs.size() > 1 ? difference_chart(report) : "");
}

std::string color_bar() {
  std::string ticks;
  static constexpr std::pair<double, const char*> kTicks[] = {
      {-16, "&minus;16"}, {-1, "&minus;1"}, {-0.1, "&minus;.1"}, {0, "0"},
      {0.1, ".1"},        {1, "1"},         {16, "16"}};
  for (const auto& [weight, label] : kTicks) {
    const double percent = std::clamp((weight_color(weight) + 0.5) / 2.56, 2.0, 98.0);
    ticks += element("span style='left:" + format("%.1f", percent) + "%'", label);
  }
  return element("div class='bar'", "<img alt='colour scale of weights from minus 16 to 16' src='" +
                                        color_bar_png() + "'>" + element("div", ticks));
}

// `name` is HTML, `spoken` the same for a screen reader.
std::string picture(const at::Tensor& weights, const std::string& spoken, const std::string& name,
                    const std::string& note) {
  const at::Tensor pixels = weights.to(at::kFloat).contiguous();
  const std::span<const float> values(pixels.const_data_ptr<float>(),
                                      static_cast<std::size_t>(pixels.numel()));
  return element("figure", "<img alt='" + spoken + ", query by key' src='" +
                               heat_map_png(values, pixels.size(0), pixels.size(1)) + "'>" +
                               element("figcaption", name + (note.empty() ? "" : "<br>" + note)));
}

std::string extremes(const at::Tensor& weights) {
  return format("%.2f", weights.min().item<double>()) + " to " +
         format("%.2f", weights.max().item<double>());
}

std::string head_pictures(const PicturedHead& head) {
  const HeadWeights& weights = head.weights;
  return element("h3", "Layer " + std::to_string(head.statistics.layer) + ", head " +
                           std::to_string(head.statistics.head)) +
         element("div class='heads'",
                 picture(weights.p, "softmax weights", "softmax weights <i>p</i>", "") +
                     picture(weights.correction, "correction",
                             "correction <i>p</i>(<i>t&#772;</i> &minus; <i>t</i>)",
                             extremes(weights.correction)) +
                     picture(weights.combined, "combined weights",
                             "combined <i>p</i>(1 + <i>t&#772;</i> &minus; <i>t</i>)",
                             extremes(weights.combined)));
}

std::string head_row(const HeadStatistics& head) {
  std::string row =
      element("td", "layer " + std::to_string(head.layer) + ", head " + std::to_string(head.head));
  for (double value : {head.cor, head.total_variation, head.negativity, head.entropy,
                       head.sink_mass, head.combined_sink_mass, head.min_weight, head.max_weight}) {
    row += element("td", format("%.2f", value));
  }
  return element("tr", row);
}

std::string head_table(const AttentionStudy& study) {
  std::string rows;
  for (const HeadStatistics& head : study.heads) rows += head_row(head);
  return table({"", "COR", "total<br>variation", "negativity", "entropy<br>of <i>p</i>",
                "sink<br>mass", "combined<br>sink mass", "least<br>weight", "largest<br>weight"},
               rows);
}

std::string attention_section(const AttentionStudy& study) {
  std::string out = element("h2", "Attention of " + escape_html(study.run));
  out += element(
      "p",
      "Softmax attention gives each earlier token <i>j</i> a weight <i>p</i> between 0 and 1. "
      "Parallax adds the correction <i>p</i>(<i>t&#772;</i> &minus; <i>t</i>), where "
      "<i>t</i> = <i>r</i>&middot;<i>k</i> and <i>t&#772;</i> is its mean under <i>p</i>. The "
      "combined weights still sum to 1, but single ones may lie below 0 (blue) or above 1 "
      "(magenta).");
  out += element("p class='soft'",
                 "Each picture has a row for every query and a column for every key, the first "
                 "token at the top left; the text has " +
                     std::to_string(study.num_tokens) + " tokens and stands below the pictures.");
  out += color_bar();
  for (const PicturedHead& head : study.pictured) out += head_pictures(head);
  out +=
      element("details", element("summary", "The text") + element("pre", escape_html(study.text)));
  out += element("details open", element("summary", "All heads in figures") + head_table(study));
  out += element(
      "p class='soft'",
      "Medians over the queries after the first " +
          std::to_string(first_analyzed_query(study.num_tokens)) +
          ". COR: size of the correction over the size of the softmax output. Total variation: sum "
          "of the absolute combined weights (1 for softmax). Negativity: sum of the negative ones. "
          "Entropy of <i>p</i> in nats. Sink mass: weight of the first token. Least and largest "
          "are extremes of the combined weights, not medians.");
  return out;
}

std::string sample_section(const Sample& sample) {
  return element("h2", "Sample of " + escape_html(sample.run)) +
         element("pre", element("b", escape_html(sample.prompt)) + escape_html(sample.text));
}

std::string config_section(const Report& report) {
  std::string out = element("h2", "Configurations");
  for (const ReportedRun& run : report.runs) {
    out += element("details", element("summary", escape_html(run.name)) +
                                  element("pre", escape_html(to_toml(run.config))));
  }
  return out;
}

std::string today() {
  const std::time_t now = std::chrono::system_clock::to_time_t(std::chrono::system_clock::now());
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[32];
  std::strftime(text, sizeof(text), "%Y-%m-%d %H:%M UTC", &utc);
  return text;
}

std::string title(const Report& report) {
  std::string names;
  for (const ReportedRun& run : report.runs) {
    names += (names.empty() ? "" : " \u00b7 ") + escape_html(run.name);
  }
  return names;
}

}  // namespace

std::string report_html(const Report& report) {
  std::string body = element("p class='eyebrow'", "parallax.cpp report, " + today());
  body += element("h1", title(report));
  body += summary_section(report) + loss_section(report);
  if (report.attention) body += attention_section(*report.attention);
  if (report.sample) body += sample_section(*report.sample);
  body += config_section(report);
  return "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'>"
         "<meta name='viewport' content='width=device-width, initial-scale=1'>" +
         element("title", title(report)) + element("style", kStyle) + "</head>\n" +
         element("body", element("main", body)) + "</html>\n";
}

}  // namespace parallax::lm
