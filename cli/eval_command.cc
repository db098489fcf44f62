// SPDX-License-Identifier: MIT
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/at_least.h"
#include "cli/commands.h"
#include "cli/live_line.h"
#include "lm/checkpoint.h"
#include "lm/dataset.h"
#include "lm/device.h"
#include "lm/error.h"
#include "lm/evaluator.h"

namespace parallax::cli {
namespace {

struct Options {
  std::string run;
  std::string data;
  std::string split = "val";
  std::int64_t seq_len = 0;
  std::int64_t batch_size = 0;
  std::int64_t num_batches = 0;
  std::string device;
  bool json = false;
};

// The dataset with the chosen split where validation_batches looks for it.
lm::Dataset open_split(const Options& options, const lm::LoadedModel& loaded) {
  const std::string path = options.data.empty() ? loaded.config.data.path : options.data;
  lm::Dataset dataset = *lm::Dataset::open(path);
  if (dataset.tokenizer->fingerprint() != loaded.tokenizer->fingerprint()) {
    throw lm::Error(path + " was tokenized with " + dataset.tokenizer->fingerprint() +
                    ", but the model reads " + loaded.tokenizer->fingerprint() +
                    ": tokenize the text again with the model's tokenizer");
  }
  if (options.split == "train") dataset.val = dataset.train;
  return dataset;
}

void show_progress(LiveLine& live, const lm::Evaluation& so_far, std::int64_t total_tokens) {
  const double done = static_cast<double>(so_far.tokens) / static_cast<double>(total_tokens);
  char line[128];
  std::snprintf(line, sizeof line, "eval %3.0f%%  loss %.4f  %.4f bits/byte  ETA %s", 100 * done,
                so_far.loss, so_far.bits_per_byte,
                format_duration(so_far.seconds * (1 - done) / done).c_str());
  live.show(line, so_far.tokens == total_tokens);
}

void print_text(const lm::LoadedModel& loaded, const Options& options,
                const lm::Evaluation& result) {
  std::printf("%s, step %lld, %s split: %lld tokens, %lld bytes of text\n",
              loaded.checkpoint.c_str(), static_cast<long long>(loaded.step), options.split.c_str(),
              static_cast<long long>(result.tokens), static_cast<long long>(result.bytes));
  std::printf("loss %.4f nats a token\nbits per byte %.4f\nperplexity per token %.4f\n",
              result.loss, result.bits_per_byte, result.perplexity);
}

void print_json(const lm::LoadedModel& loaded, const Options& options,
                const lm::Evaluation& result) {
  const nlohmann::ordered_json json = {{"checkpoint", loaded.checkpoint.string()},
                                       {"step", loaded.step},
                                       {"split", options.split},
                                       {"loss", result.loss},
                                       {"bits_per_byte", result.bits_per_byte},
                                       {"perplexity", result.perplexity},
                                       {"tokens", result.tokens},
                                       {"bytes", result.bytes},
                                       {"seconds", result.seconds}};
  std::cout << json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
}

void run(const Options& options) {
  const lm::LoadedModel loaded = lm::load_model(options.run);
  const lm::Dataset dataset = open_split(options, loaded);
  const lm::Config& config = loaded.config;
  lm::place_model(*loaded.model, loaded.config.train, options.device);
  const std::vector<lm::Batch> batches = lm::validation_batches(
      dataset, options.seq_len > 0 ? options.seq_len : config.data.seq_len,
      options.batch_size > 0 ? options.batch_size : config.train.batch_size, options.num_batches);
  lm::Evaluation result;
  {
    LiveLine live;
    result =
        lm::evaluate(*loaded.model, batches, [&](const lm::Evaluation& so_far, std::int64_t total) {
          show_progress(live, so_far, total);
        });
  }
  (options.json ? print_json : print_text)(loaded, options, result);
}

}  // namespace

void add_eval(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "eval", "Score a model on held-out text: loss, bits per byte, perplexity per token");
  command
      ->add_option("run", options->run, "Run folder (its newest checkpoint) or checkpoint folder")
      ->required();
  command->add_option("--data", options->data, "Dataset folder; the run's own where left out");
  command->add_option("--split", options->split, "Part of the dataset")
      ->check(CLI::IsMember({"val", "train"}))
      ->capture_default_str();
  command
      ->add_option("--seq-len", options->seq_len, "Tokens of a sequence; data.seq_len by default")
      ->check(at_least(1));
  command->add_option("--batch-size", options->batch_size, "train.batch_size by default")
      ->check(at_least(1));
  command->add_option("--batches", options->num_batches, "At most so many, spread over the split")
      ->check(at_least(1));
  command->add_option("--device", options->device,
                      "auto, cpu, cuda or cuda:N; as in training where left out");
  command->add_flag("--json", options->json, "Print the result as JSON");
  command->callback([options] { run(*options); });
}

}  // namespace parallax::cli
