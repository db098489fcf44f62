// SPDX-License-Identifier: MIT
#include <CLI/CLI.hpp>
#include <cstdio>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "cli/at_least.h"
#include "cli/commands.h"
#include "cli/live_line.h"
#include "lm/files.h"
#include "lm/report.h"

namespace parallax::cli {
namespace {

struct Options {
  std::vector<std::string> runs;
  std::string out = "report.html";
  lm::ReportOptions report;
  bool json = false;
};

void print_text(const Options& options, const lm::Report& report) {
  std::cout << lm::report_table(report);
  if (report.sample) {
    std::cout << "\nSample of " << report.sample->run << ":\n"
              << report.sample->prompt << report.sample->text << "\n";
  }
  std::cout << "\nreport: " << options.out << "\n";
}

void run(const Options& options) {
  const std::vector<std::filesystem::path> runs(options.runs.begin(), options.runs.end());
  lm::Report report;
  {
    LiveLine live;
    report = lm::gather_report(runs, options.report, [&](const std::string& name, double done) {
      char line[160];
      std::snprintf(line, sizeof line, "scoring %.100s on held-out text  %3.0f%%", name.c_str(),
                    100 * done);
      live.show(line, done == 1);
    });
  }
  lm::write_file(options.out, lm::report_html(report));
  if (options.json) {
    std::cout << lm::report_json(report) << "\n";
  } else {
    print_text(options, report);
  }
}

}  // namespace

void add_report(CLI::App& app) {
  auto options = std::make_shared<Options>();
  lm::ReportOptions& report = options->report;
  CLI::App* command =
      app.add_subcommand("report", "Compare runs: a table here, and one self-contained HTML page");
  command->add_option("runs", options->runs, "Run folders; the first is the baseline")->required();
  command->add_option("--out", options->out, "HTML file to write")->capture_default_str();
  command
      ->add_option("--batches", report.num_batches,
                   "Score on at most so many validation batches; all by default")
      ->check(at_least(1));
  command->add_option("--prompt", report.prompt, "Of the sample; empty: a new document");
  command->add_option("--max-new-tokens", report.max_new_tokens, "Of the sample")
      ->check(at_least(1))
      ->capture_default_str();
  command->add_option("--temperature", report.temperature, "Of the sample")
      ->check(at_least(0))
      ->capture_default_str();
  command->add_option("--seed", report.seed, "Of the sample")->capture_default_str();
  command->add_option("--text", report.text,
                      "For the attention pictures; the start of the validation split by default");
  command->add_option("--heads", report.num_heads, "Number of heads to picture")
      ->check(at_least(0))
      ->capture_default_str();
  command->add_option("--device", report.device,
                      "auto, cpu, cuda or cuda:N; as in training where left out");
  command->add_flag("--json", options->json, "Print the figures as JSON instead of the table");
  command->callback([options] { run(*options); });
}

}  // namespace parallax::cli
