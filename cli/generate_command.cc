// SPDX-License-Identifier: MIT
#include <CLI/CLI.hpp>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/at_least.h"
#include "cli/commands.h"
#include "lm/checkpoint.h"
#include "lm/device.h"
#include "lm/error.h"
#include "lm/generator.h"
#include "lm/utf8.h"

namespace parallax::cli {
namespace {

struct Options {
  std::string run;
  std::vector<std::string> prompts;
  std::string prompt_file;
  std::int64_t samples = 1;
  lm::GenerateOptions generation;
  std::string device;
  bool json = false;
};

std::vector<std::string> read_lines(const std::string& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  if (!file.eof()) throw lm::Error("cannot read the prompts in '" + path + "'");
  if (lines.empty()) {
    throw lm::Error("no prompts in '" + path + "': write one on each line, or use --prompt");
  }
  return lines;
}

// Every prompt, `samples` times each; one empty prompt where none is given.
std::vector<std::string> prompts_of(const Options& options) {
  std::vector<std::string> given = options.prompts;
  if (!options.prompt_file.empty()) given = read_lines(options.prompt_file);
  if (given.empty()) given.emplace_back();
  std::vector<std::string> prompts;
  for (const std::string& prompt : given) {
    prompts.insert(prompts.end(), static_cast<std::size_t>(options.samples), prompt);
  }
  return prompts;
}

// A single text goes to stdout as it comes.
class StreamedText {
 public:
  explicit StreamedText(const std::string& prompt) {
    std::cout << lm::to_utf8(prompt) << std::flush;
  }
  void on_text(std::string_view piece) { std::cout << piece << std::flush; }
  ~StreamedText() { std::cout << std::endl; }
};

// Several come whole, in the order of their prompts, each as soon as those before it are there.
class OrderedTexts {
 public:
  explicit OrderedTexts(const std::vector<std::string>& prompts) : prompts_(prompts) {}

  void on_done(std::size_t index, const lm::Generation& generation) {
    waiting_[index] = heading(index, generation) + lm::to_utf8(prompts_[index]) + generation.text;
    for (auto next = waiting_.find(printed_); next != waiting_.end();
         next = waiting_.find(printed_)) {
      std::cout << next->second << std::endl;
      waiting_.erase(next);
      ++printed_;
    }
  }

 private:
  static std::string heading(std::size_t index, const lm::Generation& generation) {
    return (index == 0 ? "" : "\n") + ("==> " + std::to_string(index + 1)) + ", seed " +
           std::to_string(generation.seed) + " <==\n";
  }

  const std::vector<std::string>& prompts_;
  std::map<std::size_t, std::string> waiting_;
  std::size_t printed_ = 0;
};

std::size_t count_new(const std::vector<lm::Generation>& texts) {
  std::size_t count = 0;
  for (const lm::Generation& text : texts) count += text.tokens.size();
  return count;
}

void print_summary(const lm::Generations& result) {
  const lm::GenerationTimes& times = result.times;
  const std::string texts =
      result.texts.size() > 1 ? std::to_string(result.texts.size()) + " texts; " : "";
  const bool ended = result.texts.size() == 1 && result.texts.front().ended;
  std::fprintf(stderr,
               "\n[%s%lld prompt tokens in %.2f s at %.0f tokens/s; %zu new ones at %.0f "
               "tokens/s%s]\n",
               texts.c_str(), static_cast<long long>(times.prefill_tokens), times.prefill_seconds,
               times.prefill_tokens_per_s(), count_new(result.texts), times.decode_tokens_per_s(),
               ended ? ", end of document" : "");
}

nlohmann::ordered_json json_of(const std::string& prompt, const lm::Generation& text) {
  return {{"prompt", lm::to_utf8(prompt)},       {"text", text.text}, {"tokens", text.tokens},
          {"prompt_tokens", text.prompt_tokens}, {"seed", text.seed}, {"ended", text.ended}};
}

// One text is the object itself; several are in its "texts".
void print_json(const std::vector<std::string>& prompts, const lm::Generations& result) {
  nlohmann::ordered_json json;
  if (prompts.size() == 1) {
    json = json_of(prompts.front(), result.texts.front());
  } else {
    for (std::size_t i = 0; i < prompts.size(); ++i) {
      json["texts"].push_back(json_of(prompts[i], result.texts[i]));
    }
  }
  const lm::GenerationTimes& times = result.times;
  json["prefill_tokens"] = times.prefill_tokens;
  json["prefill_seconds"] = times.prefill_seconds;
  json["prefill_tokens_per_s"] = times.prefill_tokens_per_s();
  json["decode_tokens"] = times.decode_tokens;
  json["decode_seconds"] = times.decode_seconds;
  json["tokens_per_s"] = times.decode_tokens_per_s();
  std::cout << json.dump(2) << "\n";
}

lm::Generations write_on(const Options& options, const std::vector<std::string>& prompts,
                         const lm::LoadedModel& loaded) {
  const auto generate = [&](const lm::OnText& on_text, const lm::OnDone& on_done) {
    return lm::generate(*loaded.model, *loaded.tokenizer, prompts, options.generation, on_text,
                        on_done);
  };
  if (options.json) return generate({}, {});
  if (prompts.size() == 1) {
    StreamedText text(prompts.front());
    return generate([&](std::size_t, std::string_view piece) { text.on_text(piece); }, {});
  }
  OrderedTexts texts(prompts);
  return generate({}, [&](std::size_t index, const lm::Generation& generation) {
    texts.on_done(index, generation);
  });
}

void run(const Options& options) {
  const std::vector<std::string> prompts = prompts_of(options);
  const lm::LoadedModel loaded = lm::load_model(options.run);
  lm::TrainConfig train = loaded.config.train;
  if (train.dtype == "float32") train.dtype = "auto";  // a cache on a GPU holds nothing wider
  lm::place_model(*loaded.model, train, options.device);
  const lm::Generations result = write_on(options, prompts, loaded);
  options.json ? print_json(prompts, result) : print_summary(result);
}

void add_sampling(CLI::App& command, lm::SamplingOptions& sampling) {
  command.add_option("--temperature", sampling.temperature, "0: always the likeliest token")
      ->check(at_least(0))
      ->capture_default_str();
  command.add_option("--top-k", sampling.top_k, "Among the k likeliest only; 0: off")
      ->check(at_least(0))
      ->capture_default_str();
  command.add_option("--top-p", sampling.top_p, "Among the likeliest that reach this probability")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command
      .add_option("--seed", sampling.seed,
                  "The same seed gives the same text; each further text has the next seed")
      ->capture_default_str();
}

}  // namespace

void add_generate(CLI::App& app) {
  auto options = std::make_shared<Options>();
  lm::GenerateOptions& generation = options->generation;
  CLI::App* command = app.add_subcommand("generate", "Write on from one or many prompts");
  command
      ->add_option("run", options->run, "Run folder (its newest checkpoint) or checkpoint folder")
      ->required();
  CLI::Option* prompt = command
                            ->add_option("--prompt", options->prompts,
                                         "Text to go on from, again for each further one; none or "
                                         "empty: a new document")
                            ->allow_extra_args(false);
  command->add_option("--prompts", options->prompt_file, "File with a prompt on each line")
      ->excludes(prompt);
  command->add_option("--samples", options->samples, "Texts for each prompt")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--max-new-tokens", generation.max_new_tokens, "Stop after so many")
      ->check(at_least(1))
      ->capture_default_str();
  command->add_option("--batch", generation.max_batch, "Texts that grow at the same time")
      ->check(CLI::Range(std::int64_t{1}, std::int64_t{1} << 16))
      ->capture_default_str();
  command
      ->add_option("--prefill-chunk", generation.prefill_chunk,
                   "Tokens of a long prompt read at a time: fewer take less memory")
      ->check(at_least(1))
      ->capture_default_str();
  add_sampling(*command, generation.sampling);
  command->add_option("--device", options->device,
                      "auto, cpu, cuda or cuda:N; as in training where left out");
  command->add_flag("--json", options->json, "Print the result as JSON, at the end");
  command->callback([options] { run(*options); });
}

}  // namespace parallax::cli
