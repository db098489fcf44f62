// SPDX-License-Identifier: MIT
#include "lm/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <map>

#include "lm/checksum.h"
#include "lm/error.h"
#include "lm/files.h"
#include "lm/tensor_file.h"

namespace parallax::lm {
namespace {

constexpr const char* kState = "state.json";
constexpr const char* kModel = "model.safetensors";
constexpr const char* kOptimizer = "optimizer.safetensors";
constexpr const char* kTokenizer = "tokenizer.json";
constexpr const char* kStepPrefix = "step-";
constexpr std::size_t kStepDigits = 8;
constexpr std::uint64_t kMaxStateBytes = 16 << 20;
constexpr std::uint64_t kMaxTokenizerBytes = 256 << 20;
constexpr const char* kHeadWeight = "lm_head.weight";

fs::path checkpoints_folder(const fs::path& run) { return run / "checkpoints"; }

// The step in a folder's name, or -1.
std::int64_t step_of(const std::string& name) {
  if (!name.starts_with(kStepPrefix)) return -1;
  const char* digits = name.c_str() + std::string_view(kStepPrefix).size();
  std::int64_t step = -1;
  const auto [end, error] = std::from_chars(digits, name.c_str() + name.size(), step);
  return error == std::errc() && end == name.c_str() + name.size() ? step : -1;
}

FileSeal save_text(const fs::path& path, const std::string& text) {
  OutputFile file(path);
  file.write(text);
  file.finish();
  return {file.size(), file.crc32c()};
}

const FileSeal& seal_of(const RunState& state, const char* file, const fs::path& folder) {
  const auto found = state.files.find(file);
  if (found == state.files.end()) {
    throw Error((folder / kState).string() + ": does not list " + file);
  }
  return found->second;
}

std::shared_ptr<const Tokenizer> load_sealed_tokenizer(const fs::path& folder,
                                                       const RunState& state) {
  if (state.tokenizer == bytes_tokenizer()->fingerprint()) return bytes_tokenizer();
  const fs::path path = folder / kTokenizer;
  const FileSeal& seal = seal_of(state, kTokenizer, folder);
  std::string definition = read_file(path, kMaxTokenizerBytes);
  if (definition.size() != seal.bytes || crc32c(definition) != seal.crc32c) {
    throw Error(path.string() + ": damaged (its checksum does not fit)");
  }
  return parse_tokenizer(std::move(definition), path.string());
}

RunState load_state(const fs::path& folder) {
  const fs::path path = folder / kState;
  return parse_run_state(read_file(path, kMaxStateBytes), path.string());
}

// Runs `load` and adds to its errors what helps.
template <typename Load>
auto with_fix(Load load) {
  try {
    return load();
  } catch (const Error& error) {
    throw Error(std::string(error.what()) + "; use an older checkpoint of the run");
  }
}

}  // namespace

std::filesystem::path checkpoint_path(const std::filesystem::path& run, std::int64_t step) {
  std::string digits = std::to_string(step);
  digits.insert(0, kStepDigits - std::min(kStepDigits, digits.size()), '0');
  return checkpoints_folder(run) / (kStepPrefix + digits);
}

void save_checkpoint(const std::filesystem::path& run, Checkpoint& checkpoint) {
  make_folder(checkpoints_folder(run));
  const fs::path path = checkpoint_path(run, checkpoint.state.step);
  StagedFolder staged(path);
  RunState& state = checkpoint.state;
  state.tokenizer = checkpoint.tokenizer->fingerprint();
  state.files = {
      {kModel, save_tensors(staged.path() / kModel, checkpoint.model, {{"format", "pt"}})},
      {kOptimizer, save_tensors(staged.path() / kOptimizer, checkpoint.optimizer)}};
  if (!checkpoint.tokenizer->definition().empty()) {
    state.files[kTokenizer] =
        save_text(staged.path() / kTokenizer, checkpoint.tokenizer->definition());
  }
  save_text(staged.path() / kState, to_json(state));
  staged.commit();
  checkpoint.path = path;
}

Checkpoint load_checkpoint(const std::filesystem::path& path) {
  return with_fix([&] {
    Checkpoint checkpoint;
    checkpoint.path = path;
    checkpoint.state = load_state(path);
    checkpoint.tokenizer = load_sealed_tokenizer(path, checkpoint.state);
    checkpoint.model = load_tensors(path / kModel, &seal_of(checkpoint.state, kModel, path));
    checkpoint.optimizer =
        load_tensors(path / kOptimizer, &seal_of(checkpoint.state, kOptimizer, path));
    return checkpoint;
  });
}

std::vector<std::int64_t> checkpoint_steps(const std::filesystem::path& run) {
  std::vector<std::int64_t> steps;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(checkpoints_folder(run), none)) {
    const std::int64_t step = step_of(entry.path().filename().string());
    if (step >= 0) steps.push_back(step);
  }
  std::sort(steps.begin(), steps.end());
  return steps;
}

Newest newest_checkpoint(const std::filesystem::path& run) {
  Newest newest;
  const std::vector<std::int64_t> steps = checkpoint_steps(run);
  for (auto step = steps.rbegin(); step != steps.rend(); ++step) {
    try {
      newest.checkpoint = load_checkpoint(checkpoint_path(run, *step));
      newest.found = true;
      return newest;
    } catch (const Error& error) {
      newest.rejected.push_back(error.what());
    }
  }
  return newest;
}

void prune_checkpoints(const std::filesystem::path& run, std::int64_t keep_last,
                       const std::vector<std::int64_t>& trunk_steps) {
  std::vector<std::int64_t> steps = checkpoint_steps(run);
  std::erase_if(steps, [&](std::int64_t step) {
    return std::find(trunk_steps.begin(), trunk_steps.end(), step) != trunk_steps.end();
  });
  for (auto step = steps.begin(); steps.end() - step > keep_last; ++step) {
    remove_folder(checkpoint_path(run, *step));
  }
}

void load_weights(CausalLm& model, const NamedTensors& weights, const std::string& name) {
  const auto parameters = model.named_parameters();
  std::map<std::string, at::Tensor> given(weights.begin(), weights.end());
  if (!parameters.contains(kHeadWeight)) given.erase(kHeadWeight);  // a copy of the embedding
  for (const auto& parameter : parameters) {
    const auto found = given.find(parameter.key());
    if (found == given.end()) {
      throw Error(name + ": no tensor '" + parameter.key() + "', which the config asks for");
    }
    if (found->second.sizes() != parameter->sizes()) {
      std::ostringstream message;
      message << name << ": '" << parameter.key() << "' is " << found->second.sizes()
              << ", the config asks for " << parameter->sizes();
      throw Error(message.str());
    }
  }
  for (const auto& [tensor, value] : given) {
    if (!parameters.contains(tensor)) {
      throw Error(name + ": tensor '" + tensor + "' has no place in the config's model");
    }
  }
  const torch::NoGradGuard no_grad;
  for (const auto& parameter : parameters) parameter->copy_(given.at(parameter.key()));
}

LoadedModel load_model(const std::filesystem::path& path) {
  fs::path folder = path;
  if (!fs::exists(path / kState)) {
    Newest newest = newest_checkpoint(path);
    if (!newest.found && !newest.rejected.empty()) throw Error(newest.rejected.front());
    if (!newest.found) {
      throw Error("no checkpoint in '" + path.string() +
                  "': name a run folder of `parallax train`, or one of its checkpoints");
    }
    folder = newest.checkpoint.path;
  }
  return with_fix([&] {
    const RunState state = load_state(folder);
    LoadedModel loaded;
    loaded.checkpoint = folder;
    loaded.step = state.step;
    loaded.config = parse_config(state.config, (folder / kState).string());
    loaded.tokenizer = load_sealed_tokenizer(folder, state);
    loaded.model = std::make_shared<CausalLm>(loaded.config.model, 0);
    const fs::path weights = folder / kModel;
    load_weights(*loaded.model, load_tensors(weights, &seal_of(state, kModel, folder)),
                 weights.string());
    return loaded;
  });
}

}  // namespace parallax::lm
