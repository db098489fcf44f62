// SPDX-License-Identifier: MIT
#include "lm/report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>
#include <utility>

#include "lm/chart.h"
#include "lm/checkpoint.h"
#include "lm/cost.h"
#include "lm/dataset.h"
#include "lm/device.h"
#include "lm/error.h"
#include "lm/generator.h"
#include "lm/utf8.h"

namespace parallax::lm {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::int64_t kPicturedTokens = 128;  // of the default text

// A run while the report is gathered: its model may be missing, and so may its data.
struct OpenRun {
  ReportedRun reported;
  std::optional<LoadedModel> loaded;
  std::shared_ptr<const Dataset> dataset;
};

void check_run_folder(const fs::path& run) {
  if (!fs::is_regular_file(run / "config.toml")) {
    throw Error("no run in " + run.string() +
                ": config.toml is missing; name a folder that `parallax train` wrote");
  }
}

double median_tokens_per_s(const std::vector<MetricsRecord>& metrics) {
  std::vector<double> rates;
  for (const MetricsRecord& record : metrics) {
    if (record.kind == "train") rates.push_back(record.tokens_per_s);
  }
  if (rates.empty()) return 0;
  std::nth_element(rates.begin(), rates.begin() + rates.size() / 2, rates.end());
  return rates[rates.size() / 2];
}

std::shared_ptr<const Dataset> open_dataset(const Config& config, const std::string& name,
                                            std::vector<std::string>& remarks) {
  try {
    return Dataset::open(config.data.path);
  } catch (const Error& error) {
    remarks.push_back(name + ": the last evaluation in training stands for the validation split (" +
                      error.what() + ")");
    return nullptr;
  }
}

OpenRun open_run(const fs::path& folder, const std::string& name, const std::string& device,
                 std::vector<std::string>& remarks) {
  check_run_folder(folder);
  OpenRun run;
  ReportedRun& reported = run.reported;
  reported.name = name;
  reported.config = load_config((folder / "config.toml").string());
  if (checkpoint_steps(folder).empty()) {
    remarks.push_back(name + ": no checkpoint yet, so there is no score, sample or attention");
  } else {
    run.loaded = load_model(folder);
    place_model(*run.loaded->model, run.loaded->config.train, device);
    reported.config = run.loaded->config;
    reported.step = run.loaded->step;
    run.dataset = open_dataset(reported.config, name, remarks);
  }
  if (fs::exists(folder / "metrics.jsonl")) reported.metrics = read_metrics(folder);
  const Config& config = reported.config;
  reported.parameters = parameter_count(config.model);
  reported.forward_flops_per_token = forward_flops_per_token(config.model, config.data.seq_len);
  reported.training_flops_per_token = training_flops_per_token(config.model, config.data.seq_len);
  reported.tokens_per_s = median_tokens_per_s(reported.metrics);
  return run;
}

// Folder names, or whole paths where two folders share a name.
std::vector<std::string> run_names(const std::vector<fs::path>& runs) {
  std::vector<std::string> names;
  std::multiset<std::string> seen;
  for (const fs::path& run : runs) {
    const fs::path whole = fs::absolute(run).lexically_normal();
    names.push_back((whole.has_filename() ? whole : whole.parent_path()).filename().string());
    seen.insert(names.back());
  }
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (seen.count(names[i]) > 1) names[i] = runs[i].string();
  }
  return names;
}

void score(OpenRun& run, const ReportOptions& options, const ReportProgress& progress) {
  if (!run.loaded || !run.dataset) return;
  const Config& config = run.reported.config;
  const std::vector<Batch> batches = validation_batches(
      *run.dataset, config.data.seq_len, config.train.batch_size, options.num_batches);
  run.reported.validation =
      evaluate(*run.loaded->model, batches, [&](const Evaluation& so_far, std::int64_t total) {
        if (progress) {
          progress(run.reported.name,
                   static_cast<double>(so_far.tokens) / static_cast<double>(total));
        }
      });
}

// What makes two runs see the same tokens in the same order.
auto token_order(const OpenRun& run) {
  const Config& config = run.reported.config;
  return std::tuple(run.dataset ? run.dataset->fingerprint : config.data.path, config.data.seed,
                    config.data.seq_len, config.train.batch_size * config.train.accumulate);
}

void add_comparison_remarks(const std::vector<OpenRun>& runs, std::vector<std::string>& remarks) {
  for (const OpenRun& run : runs) {
    const ReportedRun& reported = run.reported;
    if (run.loaded && reported.step < reported.config.train.steps) {
      remarks.push_back(reported.name + ": stands at step " + std::to_string(reported.step) +
                        " of " + std::to_string(reported.config.train.steps));
    }
    if (token_order(run) != token_order(runs.front())) {
      remarks.push_back(reported.name + ": did not see the same tokens in the same order as " +
                        runs.front().reported.name);
    }
  }
}

// The last run with a model, a Parallax one where there is one.
OpenRun* run_to_show(std::vector<OpenRun>& runs) {
  OpenRun* shown = nullptr;
  for (OpenRun& run : runs) {
    if (!run.loaded) continue;
    const bool replaces_parallax = shown && shown->reported.config.model.mixer == "parallax";
    if (run.reported.config.model.mixer == "parallax" || !replaces_parallax) shown = &run;
  }
  return shown;
}

Sample make_sample(OpenRun& run, const ReportOptions& options) {
  GenerateOptions generation;
  generation.max_new_tokens = options.max_new_tokens;
  generation.sampling.temperature = options.temperature;
  generation.sampling.seed = options.seed;
  const Generation written =
      generate(*run.loaded->model, *run.loaded->tokenizer, options.prompt, generation);
  return {run.reported.name, options.prompt, written.text};
}

// The tokens to study: of the given text, else the start of the validation split.
std::vector<std::int32_t> tokens_to_study(const OpenRun& run, const ReportOptions& options) {
  std::vector<std::int32_t> tokens;
  if (!options.text.empty()) {
    tokens = run.loaded->tokenizer->encode(options.text);
    tokens.resize(std::min<std::size_t>(tokens.size(), kMaxAnalyzedTokens));
  } else if (run.dataset) {
    std::vector<std::int64_t> stream(std::min(kPicturedTokens, run.dataset->val.size()));
    run.dataset->val.read(0, static_cast<std::int64_t>(stream.size()), stream.data());
    tokens.assign(stream.begin(), stream.end());
  }
  return tokens;
}

std::optional<AttentionStudy> study_attention(OpenRun& run, const ReportOptions& options) {
  const std::vector<std::int32_t> tokens = tokens_to_study(run, options);
  if (tokens.size() < 2) return std::nullopt;
  const at::Tensor text = at::tensor(tokens, at::kLong);
  AttentionStudy study;
  study.run = run.reported.name;
  study.text = to_utf8(run.loaded->tokenizer->decode(tokens));
  study.num_tokens = text.numel();
  study.heads = analyze_heads(*run.loaded->model, text);
  for (const HeadStatistics& head : telling_heads(study.heads, options.num_heads)) {
    study.pictured.push_back(
        {head, weights_of_head(*run.loaded->model, text, head.layer, head.head)});
  }
  return study;
}

Json number_or_null(double value) { return std::isfinite(value) ? Json(value) : Json(); }

Json run_json(const ReportedRun& run) {
  Json validation;
  if (run.validation) {
    validation = {{"loss", run.validation->loss},
                  {"bits_per_byte", run.validation->bits_per_byte},
                  {"perplexity", run.validation->perplexity},
                  {"tokens", run.validation->tokens},
                  {"bytes", run.validation->bytes}};
  }
  return {{"name", run.name},
          {"mixer", run.config.model.mixer},
          {"step", run.step},
          {"steps", run.config.train.steps},
          {"validation", validation},
          {"validation_bits_per_byte", number_or_null(validation_bits_per_byte(run))},
          {"parameters", run.parameters},
          {"forward_flops_per_token", run.forward_flops_per_token},
          {"training_flops_per_token", run.training_flops_per_token},
          {"tokens_per_s", run.tokens_per_s}};
}

std::string table_line(const std::string& name, const std::string& bits_per_byte,
                       const std::string& parameters, const std::string& flops,
                       const std::string& tokens_per_s) {
  char line[256];
  std::snprintf(line, sizeof(line), "%-24s %14s %11s %14s %11s\n", name.c_str(),
                bits_per_byte.c_str(), parameters.c_str(), flops.c_str(), tokens_per_s.c_str());
  return line;
}

}  // namespace

Report gather_report(const std::vector<fs::path>& runs, const ReportOptions& options,
                     const ReportProgress& progress) {
  Report report;
  std::vector<OpenRun> open;
  const std::vector<std::string> names = run_names(runs);
  for (std::size_t i = 0; i < runs.size(); ++i) {
    open.push_back(open_run(runs[i], names[i], options.device, report.remarks));
    score(open.back(), options, progress);
  }
  add_comparison_remarks(open, report.remarks);
  if (OpenRun* shown = run_to_show(open)) {
    report.sample = make_sample(*shown, options);
    if (shown->reported.config.model.mixer == "parallax") {
      report.attention = study_attention(*shown, options);
    }
  }
  for (OpenRun& run : open) report.runs.push_back(std::move(run.reported));
  return report;
}

double validation_bits_per_byte(const ReportedRun& run) {
  if (run.validation) return run.validation->bits_per_byte;
  double last = std::numeric_limits<double>::quiet_NaN();
  for (const MetricsRecord& record : run.metrics) {
    if (record.kind == "eval") last = record.bits_per_byte;
  }
  return last;
}

std::string report_json(const Report& report) {
  Json json = {{"runs", Json::array()}, {"remarks", report.remarks}};
  for (const ReportedRun& run : report.runs) json["runs"].push_back(run_json(run));
  if (report.sample) {
    json["sample"] = {{"run", report.sample->run},
                      {"prompt", to_utf8(report.sample->prompt)},
                      {"text", report.sample->text}};
  }
  if (report.attention) {
    json["attention"] = {{"run", report.attention->run},
                         {"text", report.attention->text},
                         {"heads", Json::parse(heads_json(report.attention->heads))}};
  }
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

std::string report_table(const Report& report) {
  std::string table =
      table_line("", "validation", "", "training", "training") +
      table_line("run", "bits per byte", "parameters", "FLOPs per token", "tokens/s");
  for (const ReportedRun& run : report.runs) {
    char bits_per_byte[32];
    std::snprintf(bits_per_byte, sizeof(bits_per_byte), "%.4f", validation_bits_per_byte(run));
    table += table_line(run.name, bits_per_byte, grouped_digits(run.parameters),
                        short_number(run.training_flops_per_token),
                        grouped_digits(std::llround(run.tokens_per_s)));
  }
  for (const std::string& remark : report.remarks) table += "note: " + remark + "\n";
  return table;
}

}  // namespace parallax::lm
