// SPDX-License-Identifier: MIT
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"
#include "lm/checkpoint.h"
#include "lm/device.h"
#include "lm/generator.h"
#include "lm/utf8.h"

namespace parallax::cli {
namespace {

struct Options {
  std::string run;
  std::string prompt;
  lm::GenerateOptions generation;
  std::string device;
  bool json = false;
};

double tokens_per_s(const lm::Generation& result) {
  const auto steps = static_cast<double>(result.tokens.size()) - (result.ended ? 0 : 1);
  return steps > 0 ? steps / result.decode_seconds : 0;
}

void print_summary(const lm::Generation& result) {
  std::fprintf(stderr, "\n[%lld prompt tokens in %.2f s, %zu new ones at %.0f tokens/s%s]\n",
               static_cast<long long>(result.prompt_tokens), result.prefill_seconds,
               result.tokens.size(), tokens_per_s(result), result.ended ? ", end of document" : "");
}

void print_json(const Options& options, const lm::Generation& result) {
  const nlohmann::ordered_json json = {{"prompt", lm::to_utf8(options.prompt)},
                                       {"text", result.text},
                                       {"tokens", result.tokens},
                                       {"prompt_tokens", result.prompt_tokens},
                                       {"ended", result.ended},
                                       {"prefill_seconds", result.prefill_seconds},
                                       {"tokens_per_s", tokens_per_s(result)}};
  std::cout << json.dump(2) << "\n";
}

void run(const Options& options) {
  const lm::LoadedModel loaded = lm::load_model(options.run);
  lm::place_model(*loaded.model, loaded.config.train, options.device);
  lm::OnText on_text;
  if (!options.json) {
    std::cout << lm::to_utf8(options.prompt) << std::flush;
    on_text = [](std::string_view piece) { std::cout << piece << std::flush; };
  }
  const lm::Generation result =
      lm::generate(*loaded.model, *loaded.tokenizer, options.prompt, options.generation, on_text);
  if (options.json) {
    print_json(options, result);
  } else {
    std::cout << std::endl;
    print_summary(result);
  }
}

}  // namespace

void add_generate(CLI::App& app) {
  auto options = std::make_shared<Options>();
  lm::GenerateOptions& generation = options->generation;
  lm::SamplingOptions& sampling = generation.sampling;
  CLI::App* command = app.add_subcommand("generate", "Write on from a prompt, as it comes");
  command
      ->add_option("run", options->run, "Run folder (its newest checkpoint) or checkpoint folder")
      ->required();
  command->add_option("--prompt", options->prompt, "Text to go on from; empty: a new document");
  command->add_option("--max-new-tokens", generation.max_new_tokens, "Stop after so many")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_option("--temperature", sampling.temperature, "0: always the likeliest token")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--top-k", sampling.top_k, "Among the k likeliest only; 0: off")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--top-p", sampling.top_p, "Among the likeliest that reach this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--seed", sampling.seed, "The same seed gives the same text")
      ->capture_default_str();
  command->add_option("--device", options->device,
                      "auto, cpu, cuda or cuda:N; as in training where left out");
  command->add_flag("--json", options->json, "Print the result as JSON, at the end");
  command->callback([options] { run(*options); });
}

}  // namespace parallax::cli
