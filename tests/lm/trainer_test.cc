// SPDX-License-Identifier: MIT
#include "lm/trainer.h"

#include <gmock/gmock.h>
#include <sys/resource.h>

#include <csignal>
#include <functional>
#include <limits>
#include <map>

#include "tests/lm/small_dataset.h"

namespace parallax::lm {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

// Does something after a step.
class AtStep : public TrainObserver {
 public:
  AtStep(std::int64_t step, std::function<void()> action)
      : step_(step), action_(std::move(action)) {}
  void on_step(const Progress& progress) override {
    if (progress.record.step == step_) action_();
  }

 private:
  std::int64_t step_;
  std::function<void()> action_;
};

struct Killed {};

class TrainerTest : public testing::Test {
 protected:
  TrainerTest() { make_small_dataset(folder_ / "data"); }

  fs::path run_path(const std::string& name) const { return folder_ / name; }
  Config config() const { return small_config(folder_ / "data"); }

  TrainResult train(const Config& config, const std::string& run, bool resume = false) {
    TrainObserver silent;
    return Trainer(config, run_path(run), resume).run(silent);
  }

  // Trains until `step`, asks for a stop as Ctrl-C does, and lets the trainer go.
  TrainResult stop_after(std::int64_t step, const Config& config, const std::string& run,
                         bool resume = false) {
    std::atomic<bool> stop{false};
    AtStep observer(step, [&] { stop = true; });
    return Trainer(config, run_path(run), resume).run(observer, &stop);
  }

  // Trains until `step` and dies without saving.
  void kill_after(std::int64_t step, const Config& config, const std::string& run,
                  bool resume = false) {
    AtStep observer(step, [] { throw Killed(); });
    EXPECT_THROW(Trainer(config, run_path(run), resume).run(observer), Killed);
  }

  // Weights, optimizer's state, counters and metrics are the same, bit for bit, times aside.
  void expect_same(const std::string& a, const std::string& b) const {
    const Newest left = newest_checkpoint(run_path(a)), right = newest_checkpoint(run_path(b));
    ASSERT_TRUE(left.found && right.found);
    expect_equal(left.checkpoint.model, right.checkpoint.model);
    expect_equal(left.checkpoint.optimizer, right.checkpoint.optimizer);
    EXPECT_EQ(to_json(left.checkpoint.state), to_json(right.checkpoint.state));
    EXPECT_EQ(lines(a), lines(b));
  }

  static void expect_equal(const NamedTensors& a, const NamedTensors& b) {
    ASSERT_EQ(a.size(), b.size());
    for (std::size_t i = 0; i < a.size(); ++i) {
      ASSERT_EQ(a[i].first, b[i].first);
      EXPECT_TRUE(at::equal(a[i].second, b[i].second)) << a[i].first;
    }
  }

  std::vector<std::string> lines(const std::string& run) const {
    std::vector<std::string> lines;
    for (const MetricsRecord& r : read_metrics(run_path(run))) {
      char line[200];
      std::snprintf(line, sizeof line, "%ld %s %a %a %a %a %ld %ld", static_cast<long>(r.step),
                    r.kind.c_str(), r.loss, r.bits_per_byte, r.lr, r.grad_norm,
                    static_cast<long>(r.tokens), static_cast<long>(r.skipped));
      lines.push_back(line);
    }
    return lines;
  }

  TemporaryFolder folder_;
};

TEST_F(TrainerTest, LearnsAndWritesWhatItPromises) {
  Config config = this->config();
  config.train.steps = 60;
  config.optimizer.lr = 0.05;
  const TrainResult result = train(config, "run");
  EXPECT_TRUE(result.finished);
  EXPECT_EQ(result.step, 60);
  EXPECT_EQ(result.tokens, 60 * 2 * 2 * 16);
  const auto records = read_metrics(run_path("run"));
  EXPECT_NEAR(records.front().loss, std::log(257), 0.5);
  EXPECT_LT(result.val_loss, records.front().loss - 1);
  EXPECT_EQ(result.val_loss, records.back().loss);
  for (const char* file : {"config.toml", "assignments.json", "metrics.jsonl"}) {
    EXPECT_TRUE(fs::exists(run_path("run") / file)) << file;
  }
  EXPECT_THAT(read_text(run_path("run") / "config.toml"), HasSubstr("steps = 60"));
  EXPECT_EQ(load_model(run_path("run")).step, 60);
}

TEST_F(TrainerTest, TwoRunsAreTheSame) {
  train(config(), "a");
  train(config(), "b");
  expect_same("a", "b");
}

TEST_F(TrainerTest, StoppedAndResumedEqualsUninterrupted) {
  train(config(), "straight");
  for (const int step : {1, 5, 10}) {
    const std::string run = "stopped" + std::to_string(step);
    const TrainResult stopped = stop_after(step, config(), run);
    EXPECT_FALSE(stopped.finished);
    EXPECT_EQ(stopped.step, step);
    EXPECT_EQ(load_model(run_path(run)).step, step);
    EXPECT_TRUE(train(config(), run, true).finished);
    expect_same("straight", run);
  }
}

TEST_F(TrainerTest, KilledAndResumedEqualsUninterrupted) {
  train(config(), "straight");
  for (const int step : {2, 7, 11}) {  // before the first checkpoint, and behind later ones
    const std::string run = "killed" + std::to_string(step);
    kill_after(step, config(), run);
    Trainer trainer(config(), run_path(run), true);
    EXPECT_EQ(trainer.step(), step / 4 * 4);
    TrainObserver silent;
    trainer.run(silent);
    expect_same("straight", run);
  }
}

TEST_F(TrainerTest, InterruptedManyTimes) {
  train(config(), "straight");
  kill_after(6, config(), "often");
  stop_after(7, config(), "often", true);
  kill_after(9, config(), "often", true);
  stop_after(11, config(), "often", true);
  train(config(), "often", true);
  expect_same("straight", "often");
}

TEST_F(TrainerTest, AFinishedRunStaysAsItIs) {
  const TrainResult first = train(config(), "run");
  const auto before = lines("run");
  const TrainResult again = train(config(), "run", true);
  EXPECT_TRUE(again.finished);
  EXPECT_EQ(again.val_loss, first.val_loss);
  EXPECT_EQ(lines("run"), before);
}

TEST_F(TrainerTest, ADamagedCheckpointIsPassedOver) {
  train(config(), "straight");
  stop_after(9, config(), "run");
  const fs::path weights = checkpoint_path(run_path("run"), 9) / "model.safetensors";
  write_text(weights, read_text(weights).substr(0, 500));
  Trainer trainer(config(), run_path("run"), true);
  EXPECT_EQ(trainer.step(), 8);
  EXPECT_THAT(trainer.notes()[0], AllOf(HasSubstr("passed over"), HasSubstr(weights.string())));
  TrainObserver silent;
  trainer.run(silent);
  expect_same("straight", "run");
}

TEST_F(TrainerTest, WithoutAnyGoodCheckpointItRefuses) {
  stop_after(3, config(), "run");
  const fs::path state = checkpoint_path(run_path("run"), 3) / "state.json";
  write_text(state, read_text(state) + " ");
  EXPECT_THAT(error_of([&] { train(config(), "run", true); }),
              AllOf(HasSubstr("no good checkpoint"), HasSubstr(state.string())));
}

TEST_F(TrainerTest, KeepsTheLastAndTheTrunk) {
  Config config = this->config();
  config.train.checkpoint_every = 2;
  config.train.keep_last = 2;
  config.train.trunk_steps = {3};
  train(config, "run");
  EXPECT_THAT(checkpoint_steps(run_path("run")), ElementsAre(3, 10, 12));
}

TEST_F(TrainerTest, AccumulatedPassesAddUpToOneLargeOne) {
  Config large = config();
  large.train.batch_size = 4;
  large.train.accumulate = 1;
  train(large, "large");
  train(config(), "accumulated");
  const auto a = read_metrics(run_path("large")), b = read_metrics(run_path("accumulated"));
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (a[i].kind == "eval") continue;  // other batches, other sums
    EXPECT_NEAR(a[i].loss, b[i].loss, 1e-4);
    EXPECT_NEAR(a[i].grad_norm, b[i].grad_norm, 1e-3 * a[i].grad_norm);
  }
}

TEST_F(TrainerTest, AGradientThatIsNotFiniteStopsOrIsSkipped) {
  Config config = this->config();
  config.model.init_std = 1e30;  // finite weights, whose squares are not
  EXPECT_THAT(error_of([&] { train(config, "stop"); }),
              AllOf(HasSubstr("step 1: the gradient of model.embed_tokens.weight is not finite"),
                    HasSubstr("lower optimizer.lr")));
  EXPECT_TRUE(checkpoint_steps(run_path("stop")).empty());

  config.train.nonfinite = "skip";
  config.train.steps = 3;
  const TrainResult result = train(config, "skip");
  EXPECT_EQ(result.skipped, 3);
  const auto records = read_metrics(run_path("skip"));
  EXPECT_EQ(records.front().skipped, 3);
  EXPECT_TRUE(std::isnan(records.front().loss));
  const CausalLm fresh(config.model, static_cast<std::uint64_t>(config.train.seed));
  const LoadedModel kept = load_model(run_path("skip"));
  for (const auto& parameter : fresh.named_parameters()) {
    EXPECT_TRUE(at::equal(*parameter, kept.model->named_parameters()[parameter.key()]));
  }
}

// Embeddings of zero, and a norm that divides by their root mean square.
TEST_F(TrainerTest, ALossThatIsNotFiniteNamesTheFirstActivationThatIsNot) {
  Config config = this->config();
  config.model.init_std = 0;
  config.model.rms_norm_eps = 0;
  EXPECT_THAT(error_of([&] { train(config, "stop"); }),
              HasSubstr("step 1: the loss is not finite, and first the output of "
                        "model.layers.0.input_layernorm; no checkpoint was saved yet"));
  EXPECT_TRUE(checkpoint_steps(run_path("stop")).empty());
}

TEST_F(TrainerTest, WeightsThatAreNotFiniteAreNamedAndNeverSaved) {
  stop_after(4, config(), "run");
  Config config = this->config();
  config.optimizer.adamw_lr = 1e39;  // beyond float32
  config.schedule.warmup_steps = 1;
  for (const char* choice : {"stop", "skip"}) {
    config.train.nonfinite = choice;
    EXPECT_THAT(error_of([&] { train(config, "run", true); }),
                AllOf(HasSubstr("model.embed_tokens.weight is not finite"),
                      HasSubstr(checkpoint_path(run_path("run"), 4).string())));
    EXPECT_THAT(checkpoint_steps(run_path("run")), ElementsAre(4));
  }
  EXPECT_EQ(load_model(run_path("run")).step, 4);
}

TEST_F(TrainerTest, OneTrainerAFolder) {
  TrainObserver silent;
  Trainer first(config(), run_path("run"), false);
  for (const bool resume : {false, true}) {
    EXPECT_THAT(error_of([&] { train(config(), "run", resume); }),
                AllOf(HasSubstr(run_path("run").string()), HasSubstr("in use by process")));
  }
  EXPECT_TRUE(first.run(silent).finished);
}

TEST_F(TrainerTest, AFolderWithARunNeedsResume) {
  stop_after(2, config(), "run");
  EXPECT_THAT(error_of([&] { train(config(), "run"); }), HasSubstr("add --resume"));
  EXPECT_EQ(load_model(run_path("run")).step, 2);
}

TEST_F(TrainerTest, AFullDiskLeavesTheOlderCheckpoints) {
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  ::getrlimit(RLIMIT_FSIZE, &before);
  AtStep observer(6, [&] {
    const rlimit limit = {12000, before.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &limit);
  });
  const std::string message =
      error_of([&] { Trainer(config(), run_path("run"), false).run(observer); });
  ::setrlimit(RLIMIT_FSIZE, &before);
  EXPECT_THAT(message, AllOf(HasSubstr("model.safetensors"), HasSubstr("File too large")));
  EXPECT_EQ(std::distance(fs::directory_iterator(run_path("run") / "checkpoints"), {}), 1);
  EXPECT_EQ(load_model(run_path("run")).step, 4);

  train(config(), "straight");
  train(config(), "run", true);
  expect_same("straight", "run");
}

TEST_F(TrainerTest, ARunFolderThatVanishesIsAnError) {
  AtStep observer(5, [&] { fs::remove_all(run_path("run")); });
  EXPECT_THAT(error_of([&] { Trainer(config(), run_path("run"), false).run(observer); }),
              AllOf(HasSubstr(run_path("run").string()), HasSubstr("removed")));
  EXPECT_FALSE(fs::exists(run_path("run")));
}

TEST_F(TrainerTest, WhatDoesNotFitIsRefusedBeforeAnythingIsWritten) {
  const auto refusal = [&](const std::function<void(Config&)>& change) {
    Config config = this->config();
    change(config);
    const std::string message = error_of([&] { train(config, "run"); });
    EXPECT_FALSE(fs::exists(run_path("run"))) << message;
    return message;
  };
  EXPECT_THAT(refusal([](Config& c) { c.data.path = "/nowhere"; }), HasSubstr("parallax tokenize"));
  EXPECT_THAT(refusal([](Config& c) { c.data.seq_len = 1 << 20; }), HasSubstr("data.seq_len"));
  EXPECT_THAT(refusal([](Config& c) { c.model.vocab_size = 256; }), HasSubstr("at least 257"));
  EXPECT_THAT(refusal([](Config& c) { c.optimizer.name = "sgd"; }), HasSubstr("sgd"));
}

TEST_F(TrainerTest, ResumingWithAnotherModelOrDataIsRefused) {
  stop_after(4, config(), "run");
  const auto refusal = [&](const std::function<void(Config&)>& change) {
    Config config = this->config();
    change(config);
    return error_of([&] { train(config, "run", true); });
  };
  EXPECT_THAT(refusal([](Config& c) { c.model.ffn_size = 64; }),
              HasSubstr("model.ffn_size = 32, not 64"));
  EXPECT_THAT(refusal([](Config& c) { c.data.seed = 1; }), HasSubstr("data.seed"));
  make_small_dataset(folder_ / "other", 21);
  EXPECT_THAT(refusal([&](Config& c) { c.data.path = (folder_ / "other").string(); }),
              HasSubstr("is not the dataset"));
}

TEST_F(TrainerTest, ResumingWithMoreStepsSaysWhatChanged) {
  train(config(), "run");
  Config longer = config();
  longer.train.steps = 15;
  Trainer trainer(longer, run_path("run"), true);
  EXPECT_THAT(trainer.notes(), testing::Contains("changed train.steps: 12 -> 15"));
  TrainObserver silent;
  EXPECT_EQ(trainer.run(silent).step, 15);
}

}  // namespace
}  // namespace parallax::lm
