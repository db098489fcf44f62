// SPDX-License-Identifier: MIT
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/at_least.h"
#include "cli/commands.h"
#include "cli/live_line.h"
#include "lm/corpus.h"

namespace parallax::cli {
namespace {

struct Options {
  std::vector<std::string> paths;
  std::string out;
  std::string tokenizer = "bytes";
  std::vector<std::string> extensions;
  double val_fraction = 0.05;
  std::int64_t seed = 0;
  bool json = false;
};

constexpr double kReportSeconds = 0.5;

// Prints progress, twice a second at most, and the end once.
class Reporter {
 public:
  void operator()(const lm::CorpusProgress& progress) {
    const bool done = progress.bytes == progress.total_bytes;
    if (finished_ || (!done && progress.seconds < next_)) return;
    finished_ = done;
    next_ = progress.seconds + kReportSeconds;
    const double bytes = static_cast<double>(progress.bytes);
    const double eta =
        progress.seconds * (static_cast<double>(progress.total_bytes) - bytes) / bytes;
    char line[128];
    std::snprintf(line, sizeof line, "tokenize %3.0f%%  %.1f MB  %lld documents  %.1f MB/s  ETA %s",
                  100 * bytes / static_cast<double>(progress.total_bytes), bytes / 1e6,
                  static_cast<long long>(progress.documents), bytes / 1e6 / progress.seconds,
                  format_duration(eta).c_str());
    live_.show(line, done);
  }

 private:
  LiveLine live_;
  double next_ = 0;
  bool finished_ = false;
};

nlohmann::ordered_json to_json(const lm::SplitRecord& split) {
  return {{"tokens", split.tokens}, {"documents", split.documents}, {"bytes", split.bytes}};
}

void print_text(const Options& options, const lm::CorpusResult& result) {
  for (const auto& [name, split] :
       {std::pair{"train", &result.manifest.train}, std::pair{"val", &result.manifest.val}}) {
    std::cout << name << ": " << split->tokens << " tokens, " << split->documents << " documents, "
              << split->bytes << " bytes\n";
  }
  if (result.tail_held_out) {
    std::cout << "too few documents to hold out whole ones: val has the tail of one\n";
  }
  const std::int64_t left_out = result.binary + result.unreadable + result.empty;
  if (left_out > 0) {
    std::cout << "left out: " << result.binary << " binary, " << result.unreadable
              << " unreadable, " << result.empty << " empty\n";
  }
  std::cout << "dataset: " << options.out << "\n";
}

void print_json(const Options& options, const lm::CorpusResult& result) {
  const lm::DatasetManifest& manifest = result.manifest;
  const nlohmann::ordered_json json = {{"dataset", options.out},
                                       {"fingerprint", manifest.fingerprint()},
                                       {"tokenizer", manifest.tokenizer},
                                       {"vocab_size", manifest.vocab_size},
                                       {"train", to_json(manifest.train)},
                                       {"val", to_json(manifest.val)},
                                       {"tail_held_out", result.tail_held_out},
                                       {"binary", result.binary},
                                       {"unreadable", result.unreadable},
                                       {"empty", result.empty}};
  std::cout << json.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
}

void run(const Options& options) {
  lm::CorpusOptions corpus;
  corpus.paths.assign(options.paths.begin(), options.paths.end());
  corpus.extensions = options.extensions;
  corpus.tokenizer = lm::load_tokenizer(options.tokenizer);
  corpus.val_fraction = options.val_fraction;
  corpus.seed = options.seed;
  Reporter reporter;
  const lm::CorpusResult result =
      lm::tokenize_corpus(corpus, options.out, [&](const auto& progress) { reporter(progress); });
  (options.json ? print_json : print_text)(options, result);
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("tokenize", "Turn files and folders of text into a dataset");
  command->add_option("paths", options->paths, "Files and folders of text")->required();
  command->add_option("--out", options->out, "Folder to write; must not exist")->required();
  command
      ->add_option("--tokenizer", options->tokenizer,
                   "bytes, or a Hugging Face tokenizer.json (byte-level BPE)")
      ->capture_default_str();
  command
      ->add_option("--val-fraction", options->val_fraction,
                   "Part of the bytes to hold out for validation, in whole documents")
      ->check(CLI::Range(0.0, 0.5))
      ->capture_default_str();
  command->add_option("--extensions", options->extensions, "Only such files of folders: py,md,txt")
      ->delimiter(',');
  command->add_option("--seed", options->seed, "Of the choice of held-out documents")
      ->check(at_least(0))
      ->capture_default_str();
  command->add_flag("--json", options->json, "Print the result as JSON");
  command->callback([options] { run(*options); });
}

}  // namespace parallax::cli
