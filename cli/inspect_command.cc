// SPDX-License-Identifier: MIT
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "lm/analysis.h"
#include "lm/checkpoint.h"
#include "lm/device.h"

namespace parallax::cli {
namespace {

struct Options {
  std::string run;
  std::string text;
  std::string device;
  bool json = false;
};

void print_text(const std::vector<lm::HeadStatistics>& heads, std::int64_t first_query) {
  std::printf("medians over the queries from %lld on; the weight range is over all of them\n",
              static_cast<long long>(first_query));
  std::printf("%5s %5s %8s %10s %10s %8s %8s %8s  %s\n", "layer", "head", "COR", "variation",
              "negativity", "entropy", "sink", "c-sink", "weight range");
  for (const lm::HeadStatistics& head : heads) {
    std::printf("%5lld %5lld %8.3f %10.3f %10.3f %8.3f %8.3f %8.3f  %.2f to %.2f\n",
                static_cast<long long>(head.layer), static_cast<long long>(head.head), head.cor,
                head.total_variation, head.negativity, head.entropy, head.sink_mass,
                head.combined_sink_mass, head.min_weight, head.max_weight);
  }
}

void run(const Options& options) {
  const lm::LoadedModel loaded = lm::load_model(options.run);
  lm::place_model(*loaded.model, loaded.config.train, options.device);
  const at::Tensor tokens = at::tensor(loaded.tokenizer->encode(options.text), at::kLong);
  const std::vector<lm::HeadStatistics> heads = lm::analyze_heads(*loaded.model, tokens);
  if (options.json) {
    std::cout << lm::heads_json(heads) << "\n";
  } else {
    print_text(heads, lm::first_analyzed_query(tokens.numel()));
  }
}

}  // namespace

void add_inspect(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("inspect", "What each attention head does with a text, in figures");
  command
      ->add_option("run", options->run, "Run folder (its newest checkpoint) or checkpoint folder")
      ->required();
  command->add_option("--text", options->text, "2 to 256 tokens")->required();
  command->add_option("--device", options->device,
                      "auto, cpu, cuda or cuda:N; as in training where left out");
  command->add_flag("--json", options->json, "Print the figures as JSON");
  command->callback([options] { run(*options); });
}

}  // namespace parallax::cli
