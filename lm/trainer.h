// SPDX-License-Identifier: MIT
// Trains one model in one run folder:
//   config.toml  metrics.jsonl  events.out.tfevents.*  assignments.json  checkpoints/step-*/
// A resumed run equals one that was never interrupted, bit for bit, times aside.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "lm/checkpoint.h"
#include "lm/config.h"
#include "lm/metrics.h"
#include "lm/optimizer.h"

namespace parallax::lm {

struct Progress {
  MetricsRecord record;  // kind "train": the mean since the last logged step
  std::int64_t steps = 0;
  double eta_s = 0;
  bool logged = false;  // this record went into metrics.jsonl
};

// What a run tells while it goes on. Called from the training thread; the defaults do nothing.
class TrainObserver {
 public:
  virtual ~TrainObserver() = default;
  virtual void on_step(const Progress&) {}  // every step
  virtual void on_eval(const MetricsRecord&) {}
  virtual void on_checkpoint(const std::filesystem::path&) {}
};

struct TrainResult {
  std::int64_t step = 0;
  bool finished = false;  // false: stopped on request, after saving
  std::int64_t parameters = 0;
  std::int64_t tokens = 0;
  std::int64_t skipped = 0;
  double val_loss = 0;  // of the last evaluation, NaN where there was none
  double val_bits_per_byte = 0;
  double tokens_per_s = 0;  // of training alone, in this session
  std::filesystem::path checkpoint;
};

class Trainer {
 public:
  // Opens data, run folder (locked until the trainer goes), model and optimizer. With `resume`,
  // goes on from the newest good checkpoint, or from the start where there is none yet; without,
  // refuses a folder that holds a run. Throws Error.
  Trainer(const Config& config, const std::filesystem::path& run, bool resume);
  ~Trainer();

  // Trains up to config.train.steps. When *stop turns true, finishes the step, saves and returns.
  TrainResult run(TrainObserver& observer, const std::atomic<bool>* stop = nullptr);

  std::int64_t step() const;                      // where it stands
  std::vector<Assignment> assignments() const;    // which tensor went to which optimizer
  const std::vector<std::string>& notes() const;  // what the start had to say: checkpoint, changes

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace parallax::lm
