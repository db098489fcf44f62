// SPDX-License-Identifier: MIT
// That TensorBoard reads the event file is tested in tests/python/test_train.py.
#include "lm/metrics.h"

#include <gmock/gmock.h>

#include <cmath>
#include <limits>

#include "tests/lm/temporary_folder.h"

namespace parallax::lm {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

MetricsRecord record_at(std::int64_t step, const std::string& kind = "train") {
  MetricsRecord record;
  record.step = step;
  record.kind = kind;
  record.loss = 1.0 / 3 * static_cast<double>(step);
  record.bits_per_byte = record.loss / 0.7;
  record.lr = 0.1;
  record.grad_norm = 1e-300;
  record.tokens = step * 100;
  record.skipped = 1;
  record.tokens_per_s = 1234.5;
  record.time = 1.7e9 + static_cast<double>(step);
  return record;
}

std::string event_bytes(const std::filesystem::path& run) {
  for (const auto& entry : std::filesystem::directory_iterator(run)) {
    if (entry.path().filename().string().starts_with("events.")) return read_text(entry.path());
  }
  return "";
}

TEST(Metrics, LinesHoldEveryFieldExactly) {
  const TemporaryFolder run;
  {
    MetricsWriter writer(run.path(), 0);
    writer.write(record_at(1));
    writer.write(record_at(1, "eval"));
    writer.sync();
  }
  EXPECT_THAT(read_text(run / "metrics.jsonl"),
              StartsWith("{\"step\":1,\"kind\":\"train\",\"loss\":"));
  const auto records = read_metrics(run.path());
  ASSERT_EQ(records.size(), 2u);
  EXPECT_EQ(records[0].loss, 1.0 / 3);
  EXPECT_EQ(records[0].grad_norm, 1e-300);
  EXPECT_EQ(records[0].skipped, 1);
  EXPECT_EQ(records[0].tokens, 100);
  EXPECT_EQ(records[0].time, 1.7e9 + 1);
  EXPECT_EQ(records[1].kind, "eval");
  EXPECT_EQ(records[1].lr, 0);
}

TEST(Metrics, WhatIsNotFiniteIsNull) {
  const TemporaryFolder run;
  MetricsRecord record = record_at(1);
  record.loss = std::numeric_limits<double>::quiet_NaN();
  MetricsWriter(run.path(), 0).write(record);
  EXPECT_THAT(read_text(run / "metrics.jsonl"), HasSubstr("\"loss\":null"));
  EXPECT_TRUE(std::isnan(read_metrics(run.path())[0].loss));
}

TEST(Metrics, ResumedFilesEqualUninterruptedOnes) {
  const TemporaryFolder straight, resumed;
  {
    MetricsWriter writer(straight.path(), 0);
    for (int step = 1; step <= 8; ++step) writer.write(record_at(step));
  }
  {
    MetricsWriter writer(resumed.path(), 0);
    for (int step = 1; step <= 6; ++step) writer.write(record_at(step));
  }
  // Killed in the middle of a line, two steps behind the checkpoint of step 4.
  std::filesystem::path lines = resumed / "metrics.jsonl";
  write_text(lines, read_text(lines) + "{\"step\":7,\"ki");
  EXPECT_EQ(read_metrics(resumed.path()).size(), 6u);
  {
    MetricsWriter writer(resumed.path(), 4);
    EXPECT_EQ(read_metrics(resumed.path()).size(), 4u);
    for (int step = 5; step <= 8; ++step) writer.write(record_at(step));
  }
  EXPECT_EQ(read_text(lines), read_text(straight / "metrics.jsonl"));
  EXPECT_EQ(event_bytes(resumed.path()), event_bytes(straight.path()));
}

TEST(Metrics, ARemovedFileIsAnError) {
  const TemporaryFolder folder;
  std::filesystem::create_directory(folder / "run");
  MetricsWriter writer(folder / "run", 0);
  std::filesystem::remove_all(folder / "run");
  EXPECT_THAT(error_of([&] { writer.write(record_at(1)); }), HasSubstr("was removed"));
}

TEST(Metrics, AStrangeLineIsNamed) {
  const TemporaryFolder run;
  write_text(run / "metrics.jsonl", "{\"step\":1,\"kind\":\"eval\",\"tokens\":1}\n[]\n");
  EXPECT_THAT(error_of([&] { read_metrics(run.path()); }), HasSubstr("metrics.jsonl:2"));
}

}  // namespace
}  // namespace parallax::lm
