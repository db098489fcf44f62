// SPDX-License-Identifier: MIT
// state.json of a checkpoint: what a run needs to go on, besides tensors. No torch in here.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace parallax::lm {

struct FileSeal {
  std::uint64_t bytes = 0;
  std::uint32_t crc32c = 0;
};

struct RunState {
  std::int64_t step = 0;     // updates made
  std::int64_t cursor = 0;   // BatchSampler::cursor()
  std::int64_t tokens = 0;   // seen in training
  std::int64_t skipped = 0;  // steps without an update, because something was not finite
  // Training loss since the last line of metrics: nats over tokens, and bytes of text.
  double window_nats = 0;
  std::int64_t window_tokens = 0;
  std::int64_t window_bytes = 0;
  std::string rng;                        // state of the CPU generator, hexadecimal
  std::string config;                     // TOML
  std::string tokenizer;                  // Tokenizer::fingerprint()
  std::string dataset;                    // Dataset::fingerprint
  std::string parallax;                   // version of this program
  std::string torch;                      // version of LibTorch
  std::map<std::string, FileSeal> files;  // the other files of the folder
};

std::string to_json(const RunState& state);

// Throws Error naming `name` where the checksum does not fit or a field is missing or of another
// type.
RunState parse_run_state(std::string_view text, const std::string& name);

}  // namespace parallax::lm
