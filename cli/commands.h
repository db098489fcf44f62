// SPDX-License-Identifier: MIT
// The subcommands of `parallax`. Each add_NAME registers one subcommand with its options on `app`
// and sets the callback that runs it; it lives in cli/NAME_command.cc. A callback prints its result
// to stdout and its progress to stderr, and reports failure by throwing: main.cc has the one try.
// CLI::ValidationError from a callback is a usage error (exit code 2), anything else a failure (1).
#pragma once

namespace CLI {
class App;
}

namespace parallax::cli {

void add_model(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_train(CLI::App& app);
void add_eval(CLI::App& app);
void add_generate(CLI::App& app);
void add_inspect(CLI::App& app);
void add_report(CLI::App& app);

}  // namespace parallax::cli
