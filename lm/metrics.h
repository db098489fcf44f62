// SPDX-License-Identifier: MIT
// Metrics of a run, as JSON Lines (RUN/metrics.jsonl) and as a TensorBoard event file. A line is
// written with one system call and holds
//   {"step", "kind": "train" | "eval", "loss", "bits_per_byte", "lr", "grad_norm", "tokens",
//    "skipped", "tokens_per_s", "time"}
// ("eval" has no lr, grad_norm, skipped). No torch in here.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace parallax::lm {

struct MetricsRecord {
  std::int64_t step = 0;
  std::string kind;          // "train" | "eval"
  double loss = 0;           // nats a token; "train": the mean since the line before
  double bits_per_byte = 0;  // of text
  double lr = 0;             // of the hidden matrices
  double grad_norm = 0;      // before clipping
  std::int64_t tokens = 0;   // seen in training
  std::int64_t skipped = 0;
  double tokens_per_s = 0;
  double time = 0;  // seconds since 1970
};

// Reads RUN/metrics.jsonl; an unfinished last line is left out. Throws Error naming a line that is
// not one of ours, or a missing file.
std::vector<MetricsRecord> read_metrics(const std::filesystem::path& run);

class MetricsWriter {
 public:
  // Keeps the records up to `resume_step` and drops later ones (of a run that went further than its
  // last checkpoint); 0 starts anew.
  MetricsWriter(const std::filesystem::path& run, std::int64_t resume_step);
  ~MetricsWriter();

  // Throws Error where a write fails or the file was removed.
  void write(const MetricsRecord& record);
  // Returns when all records are on the disk.
  void sync();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace parallax::lm
