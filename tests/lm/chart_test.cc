// SPDX-License-Identifier: MIT
#include "lm/chart.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "lm/heat_map.h"

namespace parallax::lm {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

TEST(RoundTicks, LinearOnesAreMultiplesOfARoundStep) {
  EXPECT_THAT(round_ticks(0, 1e6, 5, false), ElementsAre(0, 2e5, 4e5, 6e5, 8e5, 1e6));
  EXPECT_THAT(round_ticks(-0.3, 0.21, 5, false), ElementsAre(-0.2, 0, 0.2));
}

TEST(RoundTicks, LogarithmicOnesAreOneTwoFiveOfADecade) {
  EXPECT_THAT(round_ticks(1.5, 30, 6, true), ElementsAre(2, 5, 10, 20));
}

TEST(RoundTicks, ALogarithmicAxisOfASmallSpanHasLinearOnes) {
  EXPECT_GE(round_ticks(2.2, 2.9, 6, true).size(), 4u);
}

TEST(ShortNumber, HasThreeDigitsAndAUnit) {
  EXPECT_EQ(short_number(0), "0");
  EXPECT_EQ(short_number(1234567), "1.23M");
  EXPECT_EQ(short_number(-0.00321), "-0.00321");
  EXPECT_EQ(short_number(999.99), "1k");
  EXPECT_EQ(short_number(6.7468e9), "6.75G");
}

TEST(GroupedDigits, SeparatesThousands) {
  EXPECT_EQ(grouped_digits(0), "0");
  EXPECT_EQ(grouped_digits(999), "999");
  EXPECT_EQ(grouped_digits(596049920), "596,049,920");
  EXPECT_EQ(grouped_digits(-1000), "-1,000");
}

TEST(EscapeHtml, LeavesNothingThatABrowserCouldTakeForMarkup) {
  EXPECT_EQ(escape_html("<a href='x'>&\"</a>"), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;&lt;/a&gt;");
  EXPECT_EQ(escape_html(std::string("a\0b\x1b\xff\n", 6)), "a\uFFFDb\uFFFD\uFFFD\n");
}

TEST(LineChart, DrawsAndLabelsEverySeries) {
  const Series one{"<one>", 0, SeriesStyle::kMarked, {{0, 1}, {10, 2}}};
  const Series two{"two", 3, SeriesStyle::kFaint, {{0, 2}, {10, 4}}};
  const std::string svg = line_chart({}, {one, two});
  EXPECT_THAT(svg, HasSubstr("&lt;one&gt;"));
  EXPECT_THAT(svg, HasSubstr("stroke='var(--run-3)'"));
  EXPECT_THAT(svg, Not(HasSubstr("two")));  // faint ones have no label
}

TEST(LineChart, LeavesOutPointsThatItCannotPlace) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Axes axes;
  axes.y_log = true;
  const Series series{
      "run", 0, SeriesStyle::kMarked, {{0, nan}, {1, 0}, {2, -1}, {3, 5}, {4, INFINITY}, {nan, 2}}};
  const std::string svg = line_chart(axes, {series});
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
  EXPECT_THAT(svg, Not(HasSubstr("inf")));
  EXPECT_EQ(svg.find("<circle"), svg.rfind("<circle"));
}

TEST(LineChart, SaysSoWhenThereIsNothingToDraw) {
  EXPECT_THAT(line_chart({}, {}), HasSubstr("no points"));
  EXPECT_THAT(line_chart({}, {Series{"run", 0, SeriesStyle::kMarked, {}}}), HasSubstr("no points"));
}

TEST(WeightColor, IsMonotonicAndKeepsTheLandmarksApart) {
  EXPECT_EQ(weight_color(0), 128);
  EXPECT_EQ(weight_color(1), 224);
  EXPECT_EQ(weight_color(-1), 32);
  EXPECT_EQ(weight_color(16), 255);
  EXPECT_EQ(weight_color(1e30), 255);
  EXPECT_EQ(weight_color(-1e30), 1);
  EXPECT_EQ(weight_color(std::numeric_limits<double>::quiet_NaN()), 128);
  EXPECT_GT(weight_color(1.1), 224);
  int before = 0;
  for (double weight = -20; weight <= 20; weight += 0.01) {
    EXPECT_GE(weight_color(weight), before);
    before = weight_color(weight);
  }
}

TEST(HeatMap, IsAPngThatNamesItsSize) {
  const std::vector<float> weights(200 * 300, 0.5f);
  const std::string uri = heat_map_png(weights, 200, 300);
  // signature, length of IHDR, "IHDR", width 300 = 0x12c, height 200 = 0xc8
  EXPECT_THAT(uri, testing::StartsWith("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAASwAAADI"));
  EXPECT_THAT(uri, testing::EndsWith("AAAAASUVORK5CYII="));  // IEND and its checksum
}

}  // namespace
}  // namespace parallax::lm
