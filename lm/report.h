// SPDX-License-Identifier: MIT
// Compares runs: gathers what their folders hold, scores each model on the whole validation split,
// and writes one page that needs nothing but a browser, a table for the terminal, or JSON.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lm/analysis.h"
#include "lm/config.h"
#include "lm/evaluator.h"
#include "lm/metrics.h"

namespace parallax::lm {

struct ReportOptions {
  std::int64_t num_batches = 0;  // of the validation split, for the scores; 0: all of it
  std::string prompt;            // of the sample; empty: the beginning of a document
  std::int64_t max_new_tokens = 400;
  double temperature = 0.8;
  std::uint64_t seed = 0;
  std::string text;            // for the attention pictures; empty: from the validation split
  std::int64_t num_heads = 4;  // to picture
  std::string device;          // as place_model() takes it
};

struct ReportedRun {
  std::string name;  // the run folder's, with as much of its path as tells it from the others
  Config config;
  std::vector<MetricsRecord> metrics;
  std::int64_t step = 0;  // of the checkpoint read; 0 where there is none yet
  std::int64_t parameters = 0;
  double forward_flops_per_token = 0, training_flops_per_token = 0;  // at data.seq_len
  double tokens_per_s = 0;               // in training, median of the log
  std::optional<Evaluation> validation;  // absent without a checkpoint or without the data
};

struct Sample {
  std::string run, prompt, text;
};

struct PicturedHead {
  HeadStatistics statistics;
  HeadWeights weights;
};

struct AttentionStudy {
  std::string run, text;
  std::int64_t num_tokens = 0;
  std::vector<HeadStatistics> heads;  // all of them
  std::vector<PicturedHead> pictured;
};

struct Report {
  std::vector<ReportedRun> runs;
  std::optional<Sample> sample;             // of the last Parallax run, else of the last run
  std::optional<AttentionStudy> attention;  // of the last Parallax run
  // What a reader should know before comparing: missing data, different tokens, unfinished runs.
  std::vector<std::string> remarks;
};

// Tells what is being scored: the run's name and, from 0 to 1, how far it is.
using ReportProgress = std::function<void(const std::string& run, double done)>;

// Reads the run folders. Throws Error for a folder that is no run.
Report gather_report(const std::vector<std::filesystem::path>& runs, const ReportOptions& options,
                     const ReportProgress& progress = {});

// Validation bits per byte of a run: of the whole split where it was scored, else of the last
// evaluation in training; NaN without either.
double validation_bits_per_byte(const ReportedRun& run);

std::string report_html(const Report& report);   // a whole page
std::string report_json(const Report& report);   // one object: runs, remarks, sample, heads
std::string report_table(const Report& report);  // for the terminal: 80 columns, a line a run

}  // namespace parallax::lm
