// SPDX-License-Identifier: MIT
// Help, version and usage errors.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/cli/process.h"

namespace parallax::cli {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

const char* const kCommands[] = {"tokenize", "train",   "model", "eval",
                                 "generate", "inspect", "report"};

TEST(Usage, HelpNamesEveryCommand) {
  const Outcome help = run_parallax({"--help"});
  EXPECT_EQ(help.exit_code, 0);
  EXPECT_EQ(help.err, "");
  for (const char* command : kCommands) EXPECT_THAT(help.out, HasSubstr(command));
}

TEST(Usage, EveryCommandHasItsOwnHelp) {
  for (const char* command : kCommands) {
    const Outcome help = run_parallax({command, "--help"});
    EXPECT_EQ(help.exit_code, 0) << command;
    EXPECT_THAT(help.out, HasSubstr(std::string("parallax ") + command));
    EXPECT_THAT(help.out, HasSubstr("--help"));
  }
}

TEST(Usage, VersionIsOneLine) {
  const Outcome version = run_parallax({"--version"});
  EXPECT_EQ(version.exit_code, 0);
  EXPECT_THAT(version.out, testing::MatchesRegex("parallax [0-9]+\\.[0-9]+\\.[0-9]+\n"));
}

void expect_usage_error(const std::vector<std::string>& arguments, const std::string& named) {
  const Outcome outcome = run_parallax(arguments);
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, StartsWith("parallax: "));
  EXPECT_THAT(outcome.err, HasSubstr(named));
  EXPECT_THAT(outcome.err, HasSubstr("--help"));
  EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
}

TEST(Usage, WhatIsWrongIsNamed) {
  expect_usage_error({}, "subcommand");
  expect_usage_error({"trian"}, "trian");
  expect_usage_error({"--quick"}, "--quick");
  expect_usage_error({"eval"}, "run");
  expect_usage_error({"eval", "run", "--splt", "val"}, "--splt");
  expect_usage_error({"eval", "run", "--split", "test"}, "test");
  expect_usage_error({"eval", "run", "--batches", "0"}, "--batches");
  expect_usage_error({"generate", "run", "--max-new-tokens", "many"}, "many");
  expect_usage_error({"generate", "run", "--temperature", "-1"}, "--temperature");
  expect_usage_error({"generate", "run", "--prefill-chunk", "0"},
                     "--prefill-chunk: must be at least 1, got 0");
  expect_usage_error({"generate", "run", "--temperature", "nan"}, "at least 0, got nan");
  expect_usage_error({"generate", "run", "--top-p", "1.5"}, "--top-p");
  expect_usage_error({"generate", "run", "--batch", "0"}, "--batch");
  expect_usage_error({"generate", "run", "--samples", "0"}, "--samples");
  expect_usage_error({"generate", "run", "--prompt", "a", "--prompts", "b"}, "--prompt");
  expect_usage_error({"report"}, "runs");
  expect_usage_error({"inspect", "run"}, "--text");
  expect_usage_error({"tokenize", "text"}, "--out");
  expect_usage_error({"train"}, "--out");
}

}  // namespace
}  // namespace parallax::cli
