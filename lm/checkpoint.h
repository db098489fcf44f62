// SPDX-License-Identifier: MIT
// Checkpoints: RUN/checkpoints/step-00000100/ with
//   model.safetensors      the float32 weights under their Hugging Face names
//   optimizer.safetensors  the optimizer's state
//   tokenizer.json         where the tokenizer is BPE
//   state.json             everything else, and size and checksum of the files above
// A checkpoint is written to a temporary folder, synced, then renamed: under its final name it is
// whole. Each file is covered by a checksum, state.json by its own, so damage at any byte is found.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "lm/config.h"
#include "lm/model.h"
#include "lm/optimizer.h"
#include "lm/run_state.h"
#include "lm/tokenizer.h"

namespace parallax::lm {

struct Checkpoint {
  std::filesystem::path path;
  RunState state;
  std::shared_ptr<const Tokenizer> tokenizer;
  NamedTensors model;
  NamedTensors optimizer;
};

// RUN/checkpoints/step-00000100
std::filesystem::path checkpoint_path(const std::filesystem::path& run, std::int64_t step);

// Writes checkpoint.state.step of the run, replacing one of the same step in a single rename, and
// sets checkpoint.path. Throws Error on any failed write; what was there before is then untouched.
void save_checkpoint(const std::filesystem::path& run, Checkpoint& checkpoint);

// Reads and verifies all of it. Throws Error naming the file and the fix.
Checkpoint load_checkpoint(const std::filesystem::path& path);

// The steps of the checkpoint folders of a run, ascending; their content is not looked at.
std::vector<std::int64_t> checkpoint_steps(const std::filesystem::path& run);

// The newest checkpoint that verifies. `rejected` receives a line for each newer one that does not.
// Without a good one, `found` is false.
struct Newest {
  bool found = false;
  Checkpoint checkpoint;
  std::vector<std::string> rejected;
};
Newest newest_checkpoint(const std::filesystem::path& run);

// Deletes all but the last keep_last checkpoints and those of trunk_steps.
void prune_checkpoints(const std::filesystem::path& run, std::int64_t keep_last,
                       const std::vector<std::int64_t>& trunk_steps);

struct LoadedModel {
  std::filesystem::path checkpoint;
  Config config;
  std::shared_ptr<CausalLm> model;  // float32, on the CPU
  std::shared_ptr<const Tokenizer> tokenizer;
  std::int64_t step = 0;
};

// From a checkpoint folder, or from the newest good checkpoint of a run folder.
LoadedModel load_model(const std::filesystem::path& path);

// Copies weights into the model. lm_head.weight may be present where the embeddings are tied.
// Throws Error naming the first tensor that is missing, unknown or misshapen, before anything is
// changed.
void load_weights(CausalLm& model, const NamedTensors& weights, const std::string& name);

}  // namespace parallax::lm
