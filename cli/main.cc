// SPDX-License-Identifier: MIT
// The binary `parallax`: hands the command line to the subcommands and turns whatever they throw
// into one line on stderr. Exit codes: 0 success, 1 failure, 2 usage.
#include <c10/util/Exception.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>
#include <string_view>

#include "cli/commands.h"

namespace parallax::cli {
namespace {

constexpr int kFailure = 1;
constexpr int kUsage = 2;

void add_commands(CLI::App& app) {
  app.require_subcommand(1);
  add_model(app);
  add_tokenize(app);
  add_train(app);
  add_eval(app);
  add_generate(app);
  add_inspect(app);
  add_report(app);
}

std::string first_line(const std::string& message) { return message.substr(0, message.find('\n')); }

int fail(const std::string& message, int exit_code) {
  std::cout.flush();
  std::cerr << "parallax: " << first_line(message) << std::endl;
  return exit_code;
}

// The help that would have prevented a usage error: of the subcommand named, if one was.
std::string help_command(const CLI::App& app) {
  const auto chosen = app.get_subcommands();
  return "parallax " + (chosen.empty() ? "" : chosen.front()->get_name() + " ") + "--help";
}

// CLI11 answers an unknown command with "A subcommand is required"; this names the word instead.
std::string usage_message(const CLI::App& app, const CLI::ParseError& error) {
  const auto unknown = app.remaining();
  if (!app.get_subcommands().empty() || unknown.empty()) return first_line(error.what());
  return "unknown command or option '" + unknown.front() + "'";
}

int run(int argc, char** argv) {
  CLI::App app{"Trains, compares and runs language models with Parallax attention", "parallax"};
  app.set_version_flag("--version", "parallax " PARALLAX_VERSION);
  add_commands(app);
  try {
    app.parse(argc, argv);
    return 0;
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help and --version
    return fail(usage_message(app, error) + " (see " + help_command(app) + ")", kUsage);
  } catch (const c10::Error& error) {
    return fail(error.what_without_backtrace(), kFailure);
  } catch (const std::exception& error) {
    return fail(error.what(), kFailure);
  }
}

// Training lasts, and often shares its machine: threads of OpenMP that spin while they wait would
// take most of its speed. OpenMP reads its settings as it is loaded, before main(), so a setting
// made here takes a second start of the program. What the user has set stays.
void wait_passively(int argc, char** argv) {
  if (argc < 2 || std::string_view(argv[1]) != "train" || std::getenv("OMP_WAIT_POLICY")) return;
  ::setenv("OMP_WAIT_POLICY", "passive", 0);
  ::execv("/proc/self/exe", argv);  // comes back only where it failed: then they spin
}

}  // namespace
}  // namespace parallax::cli

int main(int argc, char** argv) {
  parallax::cli::wait_passively(argc, argv);
  return parallax::cli::run(argc, argv);
}
