// SPDX-License-Identifier: MIT
#include "lm/checkpoint.h"

#include <gmock/gmock.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <random>

#include "lm/tensor_file.h"
#include "tests/lm/small_dataset.h"

namespace parallax::lm {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

Checkpoint small_checkpoint(std::int64_t step) {
  Checkpoint checkpoint;
  checkpoint.state.step = step;
  checkpoint.state.cursor = 3 * step;
  checkpoint.state.window_nats = 0.1;
  checkpoint.state.config = to_toml(small_config("data"));
  checkpoint.state.dataset = "0123";
  checkpoint.tokenizer = bytes_tokenizer();
  CausalLm model(small_config("data").model, static_cast<std::uint64_t>(step));
  for (const auto& parameter : model.named_parameters()) {
    checkpoint.model.emplace_back(parameter.key(), parameter->detach());
  }
  checkpoint.optimizer = {{"step", torch::tensor(step)}, {"a.momentum", torch::randn({3, 4})}};
  return checkpoint;
}

bool equal(const NamedTensors& a, const NamedTensors& b) {
  const std::map<std::string, at::Tensor> left(a.begin(), a.end()), right(b.begin(), b.end());
  return left.size() == right.size() &&
         std::equal(left.begin(), left.end(), right.begin(), [](const auto& x, const auto& y) {
           return x.first == y.first && at::equal(x.second, y.second);
         });
}

void flip_byte(const fs::path& path, std::size_t at) {
  std::string bytes = read_text(path);
  bytes[at] = static_cast<char>(bytes[at] ^ 0x10);
  write_text(path, bytes);
}

TEST(Checkpoint, RoundTrip) {
  const TemporaryFolder run;
  Checkpoint saved = small_checkpoint(100);
  save_checkpoint(run.path(), saved);
  EXPECT_EQ(saved.path, run.path() / "checkpoints" / "step-00000100");
  const Checkpoint loaded = load_checkpoint(saved.path);
  EXPECT_EQ(to_json(loaded.state), to_json(saved.state));
  EXPECT_EQ(loaded.state.window_nats, 0.1);
  EXPECT_EQ(loaded.tokenizer->fingerprint(), "bytes");
  EXPECT_TRUE(equal(loaded.model, saved.model));
  EXPECT_TRUE(equal(loaded.optimizer, saved.optimizer));
}

TEST(Checkpoint, DamageAtAnyByteIsFoundAndTheOlderOneServes) {
  const TemporaryFolder run;
  Checkpoint old = small_checkpoint(1), last = small_checkpoint(2);
  save_checkpoint(run.path(), old);
  save_checkpoint(run.path(), last);
  std::mt19937 random(2);
  for (const char* file : {"state.json", "optimizer.safetensors", "model.safetensors"}) {
    const fs::path path = last.path / file;
    const std::string good = read_text(path);
    // Every byte at the front, where the header is, and some of the rest.
    for (std::size_t at = 0; at < good.size(); at += at < 700 ? 1 : 1 + random() % 500) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ (1 + random() % 255));
      write_text(path, bad);
      ASSERT_THAT(error_of([&] { load_checkpoint(last.path); }),
                  AllOf(HasSubstr(path.string()), HasSubstr("use an older checkpoint")))
          << file << " " << at;
      if (at % 7 != 0) continue;
      write_text(path, good.substr(0, at));
      ASSERT_THAT(error_of([&] { load_checkpoint(last.path); }), HasSubstr(path.string()));
    }
    fs::remove(path);
    ASSERT_THAT(error_of([&] { load_checkpoint(last.path); }), HasSubstr(path.string()));

    const Newest newest = newest_checkpoint(run.path());
    ASSERT_TRUE(newest.found);
    EXPECT_EQ(newest.checkpoint.state.step, 1);
    ASSERT_EQ(newest.rejected.size(), 1u);
    EXPECT_THAT(newest.rejected[0], HasSubstr(path.string()));
    write_text(path, good);
  }
  EXPECT_EQ(newest_checkpoint(run.path()).checkpoint.state.step, 2);
}

TEST(Checkpoint, SavingTheSameStepAgainReplacesIt) {
  const TemporaryFolder run;
  Checkpoint first = small_checkpoint(5), second = small_checkpoint(5);
  save_checkpoint(run.path(), first);
  flip_byte(first.path / "model.safetensors", 100);
  save_checkpoint(run.path(), second);
  EXPECT_TRUE(equal(load_checkpoint(second.path).optimizer, second.optimizer));
  EXPECT_THAT(checkpoint_steps(run.path()), ElementsAre(5));
}

TEST(Checkpoint, PruningKeepsTheLastAndTheTrunk) {
  const TemporaryFolder run;
  for (const int step : {10, 20, 30, 40, 50}) {
    Checkpoint checkpoint = small_checkpoint(step);
    save_checkpoint(run.path(), checkpoint);
  }
  prune_checkpoints(run.path(), 2, {20, 70});
  EXPECT_THAT(checkpoint_steps(run.path()), ElementsAre(20, 40, 50));
  prune_checkpoints(run.path(), 2, {20, 70});
  EXPECT_THAT(checkpoint_steps(run.path()), ElementsAre(20, 40, 50));
}

TEST(Checkpoint, AFullDiskLeavesTheOlderOneAndNothingElse) {
  const TemporaryFolder run;
  Checkpoint old = small_checkpoint(1);
  save_checkpoint(run.path(), old);
  const pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {5000, 5000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    Checkpoint checkpoint = old;
    checkpoint.state.step = 2;
    const std::string message = error_of([&] { save_checkpoint(run.path(), checkpoint); });
    ::_exit(message.find("model.safetensors: File too large") != std::string::npos ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(std::distance(fs::directory_iterator(run / "checkpoints"), {}), 1);
  EXPECT_EQ(newest_checkpoint(run.path()).checkpoint.state.step, 1);
}

TEST(LoadModel, FromRunAndCheckpointFolder) {
  const TemporaryFolder run;
  Checkpoint checkpoint = small_checkpoint(7);
  save_checkpoint(run.path(), checkpoint);
  for (const fs::path& path : {run.path(), checkpoint.path}) {
    const LoadedModel loaded = load_model(path);
    EXPECT_EQ(loaded.step, 7);
    EXPECT_EQ(loaded.checkpoint, checkpoint.path);
    EXPECT_EQ(to_toml(loaded.config), checkpoint.state.config);
    NamedTensors weights;
    for (const auto& parameter : loaded.model->named_parameters()) {
      weights.emplace_back(parameter.key(), parameter->detach());
    }
    EXPECT_TRUE(equal(weights, checkpoint.model));
  }
  const TemporaryFolder empty;
  EXPECT_THAT(error_of([&] { load_model(empty.path()); }), HasSubstr("no checkpoint in"));
}

TEST(LoadWeights, WhatDoesNotFitTheConfigIsNamed) {
  CausalLm model(small_config("data").model, 0);
  const auto refusal = [&](const std::function<void(NamedTensors&)>& change) {
    NamedTensors weights = small_checkpoint(1).model;
    change(weights);
    return error_of([&] { load_weights(model, weights, "some.safetensors"); });
  };
  EXPECT_EQ(refusal([](NamedTensors& weights) {
              weights.emplace_back("lm_head.weight", torch::zeros({257, 16}));  // tied: a copy
            }),
            "");
  EXPECT_THAT(refusal([](NamedTensors& weights) { weights.pop_back(); }),
              AllOf(HasSubstr("some.safetensors"), HasSubstr("no tensor '")));
  EXPECT_THAT(refusal([](NamedTensors& weights) { weights[0].second = torch::zeros({3}); }),
              AllOf(HasSubstr("is [3]"), HasSubstr("asks for")));
  const at::Tensor before = model.parameters()[0].detach().clone();
  EXPECT_THAT(refusal([](NamedTensors& weights) {
                weights[0].second += 1;
                weights.emplace_back("extra", torch::zeros({3}));
              }),
              HasSubstr("'extra'"));
  EXPECT_TRUE(at::equal(model.parameters()[0], before));
}

TEST(RunState, HostileTextsAreRefused) {
  RunState state;
  state.files["model.safetensors"] = {5, 6};
  const std::string good = to_json(state);
  EXPECT_EQ(to_json(parse_run_state(good, "state.json")), good);
  for (const std::string& bad : {std::string(), std::string("{}"), good.substr(1), good + " ",
                                 std::string(100, '['), good.substr(0, good.size() - 3)}) {
    EXPECT_THAT(error_of([&] { parse_run_state(bad, "state.json"); }), HasSubstr("state.json: "));
  }
}

}  // namespace
}  // namespace parallax::lm
