// SPDX-License-Identifier: MIT
#include "lm/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace parallax::lm {
namespace {

// 100 steps: 10 of warm-up, decay over the last 20.
ScheduleConfig wsd(const std::string& shape) {
  ScheduleConfig config;
  config.name = "wsd";
  config.warmup_fraction = 0.1;
  config.decay_fraction = 0.2;
  config.decay_shape = shape;
  return config;
}

TEST(Schedule, WarmsUpFromOnePartToWhole) {
  for (const char* name : {"wsd", "cosine", "constant"}) {
    ScheduleConfig config = wsd("linear");
    config.name = name;
    EXPECT_DOUBLE_EQ(lr_scale(config, 0, 100), 0.1) << name;
    EXPECT_DOUBLE_EQ(lr_scale(config, 4, 100), 0.5) << name;
    EXPECT_DOUBLE_EQ(lr_scale(config, 9, 100), 1) << name;
    config.warmup_steps = 4;  // goes before the fraction
    EXPECT_DOUBLE_EQ(lr_scale(config, 0, 100), 0.25) << name;
  }
}

TEST(Schedule, WsdIsFlatThenDecays) {
  for (const char* shape : {"linear", "sqrt", "cosine"}) {
    for (int step = 9; step <= 80; ++step) {
      EXPECT_DOUBLE_EQ(lr_scale(wsd(shape), step, 100), 1) << shape << step;
    }
    for (int step = 81; step < 100; ++step) {
      EXPECT_LT(lr_scale(wsd(shape), step, 100), lr_scale(wsd(shape), step - 1, 100)) << shape;
    }
    EXPECT_GT(lr_scale(wsd(shape), 99, 100), 0) << shape;
    EXPECT_NEAR(lr_scale(wsd(shape), 100, 100), 0, 1e-15) << shape;
  }
  EXPECT_DOUBLE_EQ(lr_scale(wsd("linear"), 85, 100), 0.75);
  EXPECT_DOUBLE_EQ(lr_scale(wsd("sqrt"), 85, 100), 0.5);
  EXPECT_DOUBLE_EQ(lr_scale(wsd("cosine"), 90, 100), 0.5);
}

TEST(Schedule, CosineRunsFromTheWarmUpToTheEnd) {
  ScheduleConfig config = wsd("linear");
  config.name = "cosine";
  config.min_lr_ratio = 0.1;
  EXPECT_DOUBLE_EQ(lr_scale(config, 10, 100), 1);
  EXPECT_NEAR(lr_scale(config, 55, 100), 0.1 + 0.9 * 0.5, 1e-12);
  EXPECT_NEAR(lr_scale(config, 40, 100), 0.1 + 0.9 * 0.75, 1e-12);  // cos(60 degrees)
  EXPECT_NEAR(lr_scale(config, 100, 100), 0.1, 1e-12);
}

TEST(Schedule, ConstantStays) {
  ScheduleConfig config = wsd("linear");
  config.name = "constant";
  config.wd_anneal_gamma = 2;
  EXPECT_DOUBLE_EQ(lr_scale(config, 99, 100), 1);
  EXPECT_DOUBLE_EQ(wd_scale(config, 99, 100), 1);
}

TEST(Schedule, WeightDecayAnnealsInTheDecay) {
  ScheduleConfig config = wsd("linear");
  for (int step = 0; step < 100; ++step) EXPECT_DOUBLE_EQ(wd_scale(config, step, 100), 1);
  config.wd_anneal_gamma = 2;
  EXPECT_DOUBLE_EQ(wd_scale(config, 0, 100), 1);
  EXPECT_DOUBLE_EQ(wd_scale(config, 80, 100), 1);
  EXPECT_DOUBLE_EQ(wd_scale(config, 90, 100), 0.25);
  config.wd_anneal_gamma = 0.5;
  EXPECT_DOUBLE_EQ(wd_scale(config, 95, 100), 0.5);
}

TEST(Schedule, AWholeRunOfDecayStartsAtOnce) {
  ScheduleConfig config = wsd("linear");
  config.warmup_fraction = 0;
  config.decay_fraction = 1;
  EXPECT_DOUBLE_EQ(lr_scale(config, 0, 4), 1);
  EXPECT_DOUBLE_EQ(lr_scale(config, 3, 4), 0.25);
}

}  // namespace
}  // namespace parallax::lm
