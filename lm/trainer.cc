// SPDX-License-Identifier: MIT
#include "lm/trainer.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numbers>

#include "lm/data.h"
#include "lm/device.h"
#include "lm/error.h"
#include "lm/evaluator.h"
#include "lm/files.h"
#include "lm/mixers/attention.h"
#include "lm/run_folder.h"
#include "lm/schedule.h"

namespace parallax::lm {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::string_view kHexDigits = "0123456789abcdef";

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

double unix_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// On a GPU LibTorch is repeatable only when told so, and cuBLAS only with a fixed workspace.
void make_repeatable(at::Device device) {
  if (!device.is_cuda()) return;
  ::setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", 0);
  at::globalContext().setDeterministicAlgorithms(true, false);
  at::globalContext().setDeterministicFillUninitializedMemory(false);
}

std::string dtype_name(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? "bfloat16" : "float32";
}

std::string generator_state() {
  const at::Tensor state = at::globalContext().defaultGenerator(at::kCPU).get_state();
  const auto* bytes = state.const_data_ptr<std::uint8_t>();
  std::string digits;
  for (std::size_t i = 0; i < state.nbytes(); ++i) {
    digits += kHexDigits[bytes[i] >> 4];
    digits += kHexDigits[bytes[i] & 15];
  }
  return digits;
}

void set_generator_state(const std::string& digits, const std::string& name) {
  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU);
  at::Tensor state = generator.get_state();
  if (digits.size() != 2 * state.nbytes() ||
      digits.find_first_not_of(kHexDigits) != std::string::npos) {
    throw Error(name +
                ": \"rng\" is of another version of LibTorch; use the version that wrote it");
  }
  auto* bytes = state.mutable_data_ptr<std::uint8_t>();
  for (std::size_t i = 0; i < state.nbytes(); ++i) {
    const std::size_t high = kHexDigits.find(digits[2 * i]);
    const std::size_t low = kHexDigits.find(digits[2 * i + 1]);
    bytes[i] = static_cast<std::uint8_t>(high << 4 | low);
  }
  generator.set_state(state);
}

bool is_finite(const at::Tensor& tensor) {
  return !tensor.defined() || at::isfinite(tensor).all().item<bool>();
}

bool is_due(std::int64_t step, std::int64_t every) { return every > 0 && step % every == 0; }

std::shared_ptr<CausalLm> make_model(const Config& config, const Tokenizer& tokenizer,
                                     at::Device device) {
  if (config.model.vocab_size < tokenizer.vocab_size()) {
    throw Error("model.vocab_size is " + std::to_string(config.model.vocab_size) +
                ", but the dataset's tokenizer (" + tokenizer.kind() + ") needs at least " +
                std::to_string(tokenizer.vocab_size()));
  }
  auto model =
      std::make_shared<CausalLm>(config.model, static_cast<std::uint64_t>(config.train.seed));
  model->to(device);
  model->compute_in(compute_dtype(config, device));
  return model;
}

}  // namespace

struct Trainer::Impl {
  Impl(const Config& given, const fs::path& folder, bool resume)
      : config(given),
        run(folder),
        device(resolve_device(config.train.device)),
        dataset(Dataset::open(config.data.path)),
        sampler(dataset, config.data.seq_len, static_cast<std::uint64_t>(config.data.seed)),
        val(validation_batches(*dataset, config.data.seq_len, config.train.batch_size,
                               config.train.eval_batches)),
        model(make_model(config, *dataset->tokenizer, device)),
        optimizer(model->named_parameters(), config.optimizer, config.model),
        parameters(model->parameters()) {
    make_repeatable(device);
    make_folder(run);
    lock = std::make_unique<FolderLock>(run);
    remove_leftovers(run);
    remove_leftovers(run / "checkpoints");
    if (holds_run(run)) {
      if (!resume) {
        throw Error(
            "'" + run.string() +
            "' holds a run already: add --resume to go on with it, or choose another folder");
      }
      restore();
    }
    note_what_computes();
    write_run_files(run, config, optimizer.assignments());
    metrics = std::make_unique<MetricsWriter>(run, state.step);
  }

  void note_what_computes() {
    const at::ScalarType dtype = compute_dtype(config, device);
    std::string line = "computes in " + dtype_name(dtype) + " on " + device.str();
    if (dtype != at::kFloat) line += "; weights, gradients and optimizer state are float32";
    notes.push_back(line);
    notes.push_back("attention: " +
                    attention_backend(config.model, at::device(device).dtype(dtype)));
  }

  void restore() {
    const Newest newest = newest_checkpoint(run);
    for (const std::string& reason : newest.rejected) notes.push_back("passed over: " + reason);
    if (!newest.found && !newest.rejected.empty()) {
      throw Error("no good checkpoint in '" + run.string() + "': " + newest.rejected.front());
    }
    if (!newest.found) {
      notes.push_back("no checkpoint yet: starts from the beginning");
      return;
    }
    const Checkpoint& checkpoint = newest.checkpoint;
    const std::string name = checkpoint.path.string();
    check_same_data(checkpoint.state, name);
    for (const std::string& change :
         resumable_changes(parse_config(checkpoint.state.config, name), config)) {
      notes.push_back("changed " + change);
    }
    load_weights(*model, checkpoint.model, name);
    optimizer.load_state(checkpoint.optimizer);
    set_generator_state(checkpoint.state.rng, name);
    state = checkpoint.state;
    sampler.seek(state.cursor);
    last_checkpoint = checkpoint.path;
    notes.push_back("goes on from " + name);
  }

  void check_same_data(const RunState& saved, const std::string& name) const {
    if (saved.dataset == dataset->fingerprint) return;
    throw Error("'" + config.data.path + "' is not the dataset that " + name +
                " was trained on: set data.path to that one, or start another run");
  }

  TrainResult train(TrainObserver& observer, const std::atomic<bool>* stop) {
    const Stopwatch session;
    const std::int64_t first_step = state.step;
    const std::int64_t steps = config.train.steps;
    TrainResult result;
    read_last_evaluation(result);
    while (state.step < steps) {
      const Stopwatch step_watch;
      const double lr = lr_scale(config.schedule, state.step, steps);
      const double grad_norm = make_step(lr);
      train_seconds += step_watch.seconds();
      window_seconds += step_watch.seconds();

      const bool last = state.step == steps;
      Progress progress;
      progress.record = train_record(lr * config.optimizer.lr, grad_norm);
      progress.steps = steps;
      progress.eta_s = session.seconds() / static_cast<double>(state.step - first_step) *
                       static_cast<double>(steps - state.step);
      progress.logged = last || is_due(state.step, config.train.log_every);
      if (progress.logged) log(progress.record);
      observer.on_step(progress);
      if (last || is_due(state.step, config.train.eval_every)) evaluate_held_out(observer, result);
      const bool stopping = stop != nullptr && stop->load();
      if (last || stopping || is_checkpoint_step()) save(observer);
      if (stopping) break;
    }
    result.step = state.step;
    result.finished = state.step >= steps;
    for (const at::Tensor& parameter : parameters) result.parameters += parameter.numel();
    result.tokens = state.tokens;
    result.skipped = state.skipped;
    result.tokens_per_s =
        train_seconds > 0 ? static_cast<double>(session_tokens) / train_seconds : 0;
    result.checkpoint = last_checkpoint;
    return result;
  }

  // One update, or none where something is not finite. Returns the norm of the gradient.
  double make_step(double lr) {
    const std::int64_t step = state.step++;
    optimizer.zero_grad();
    double nats = 0;
    std::int64_t tokens = 0, bytes = 0;
    at::Tensor suspect;  // the tokens of the first loss that is not finite
    for (std::int64_t pass = 0; pass < config.train.accumulate; ++pass) {
      const Batch batch = sampler.next(config.train.batch_size);
      const at::Tensor loss = model->loss(batch.tokens.to(device), batch.targets.to(device));
      (loss / static_cast<double>(config.train.accumulate)).backward();
      const double loss_value = loss.item<double>();
      if (!std::isfinite(loss_value) && !suspect.defined()) suspect = batch.tokens;
      nats += loss_value * static_cast<double>(batch.targets.numel());
      tokens += batch.targets.numel();
      bytes += batch.bytes;
    }
    state.cursor = sampler.cursor();
    state.tokens += tokens;
    session_tokens += tokens;
    pending_tokens += tokens;
    const double grad_norm = clip_grad_norm(parameters, config.train.grad_clip);
    if (!std::isfinite(nats) || !std::isfinite(grad_norm)) {
      skip_or_stop(suspect);
      return grad_norm;
    }
    state.window_nats += nats;
    state.window_tokens += tokens;
    state.window_bytes += bytes;
    optimizer.step(lr, wd_scale(config.schedule, step, config.train.steps));
    return grad_norm;
  }

  // Counts a step that made no update, where the config wants that and the weights are still good.
  // `suspect`: tokens whose loss is not finite; undefined where a gradient alone is not.
  void skip_or_stop(const at::Tensor& suspect) {
    const std::string bad_weight = first_not_finite(false);
    if (config.train.nonfinite == "skip" && bad_weight.empty()) {
      ++state.skipped;
      return;
    }
    std::string what = bad_weight + " is not finite";
    if (bad_weight.empty() && suspect.defined()) {
      what = "the loss is not finite, and first the output of " + first_bad_activation(suspect);
    } else if (bad_weight.empty()) {
      what = "the gradient of " + first_not_finite(true) + " is not finite";
    }
    throw Error("step " + std::to_string(state.step) + ": " + what + "; " +
                (last_checkpoint.empty()
                     ? "no checkpoint was saved yet"
                     : "the last good checkpoint is " + last_checkpoint.string()) +
                "; lower optimizer.lr, or set train.nonfinite = \"skip\"");
  }

  // The name of the first activation of these tokens' forward pass that is not finite: of the loss
  // itself, where all others are.
  std::string first_bad_activation(const at::Tensor& tokens) {
    std::string first;
    model->trace(tokens.to(device), [&](const std::string& name, const at::Tensor& activation) {
      if (first.empty() && !is_finite(activation)) first = name;
    });
    return first.empty() ? "the cross-entropy" : first;
  }

  // The name of the first weight, or weight's gradient, that is not finite.
  std::string first_not_finite(bool gradients) const {
    for (const auto& parameter : model->named_parameters()) {
      if (!is_finite(gradients ? parameter->grad() : *parameter)) return parameter.key();
    }
    return "";
  }

  MetricsRecord train_record(double lr, double grad_norm) const {
    const bool empty = state.window_tokens == 0;
    MetricsRecord record;
    record.step = state.step;
    record.kind = "train";
    record.loss = empty ? kNaN : state.window_nats / static_cast<double>(state.window_tokens);
    record.bits_per_byte =
        empty ? kNaN
              : state.window_nats / std::numbers::ln2 / static_cast<double>(state.window_bytes);
    record.lr = lr;
    record.grad_norm = grad_norm;
    record.tokens = state.tokens;
    record.skipped = state.skipped;
    record.tokens_per_s = static_cast<double>(pending_tokens) / window_seconds;
    record.time = unix_time();
    return record;
  }

  void log(const MetricsRecord& record) {
    metrics->write(record);
    state.window_nats = 0;
    state.window_tokens = state.window_bytes = 0;
    pending_tokens = 0;
    window_seconds = 0;
  }

  void evaluate_held_out(TrainObserver& observer, TrainResult& result) {
    const Evaluation evaluation = evaluate(*model, val);
    MetricsRecord record;
    record.step = state.step;
    record.kind = "eval";
    record.loss = evaluation.loss;
    record.bits_per_byte = evaluation.bits_per_byte;
    record.tokens = state.tokens;
    record.tokens_per_s = static_cast<double>(evaluation.tokens) / evaluation.seconds;
    record.time = unix_time();
    metrics->write(record);
    result.val_loss = record.loss;
    result.val_bits_per_byte = record.bits_per_byte;
    observer.on_eval(record);
  }

  // What an earlier session has measured stays the answer until there is a newer one.
  void read_last_evaluation(TrainResult& result) const {
    result.val_loss = result.val_bits_per_byte = kNaN;
    for (const MetricsRecord& record : read_metrics(run)) {
      if (record.kind != "eval") continue;
      result.val_loss = record.loss;
      result.val_bits_per_byte = record.bits_per_byte;
    }
  }

  bool is_checkpoint_step() const {
    const auto& trunk = config.train.trunk_steps;
    return is_due(state.step, config.train.checkpoint_every) ||
           std::find(trunk.begin(), trunk.end(), state.step) != trunk.end();
  }

  void save(TrainObserver& observer) {
    const std::string bad_weight = first_not_finite(false);
    if (!bad_weight.empty()) {
      throw Error("step " + std::to_string(state.step) + ": " + bad_weight +
                  " is not finite, so nothing was saved; lower optimizer.lr");
    }
    metrics->sync();  // the lines up to here are on the disk before the checkpoint is
    Checkpoint checkpoint;
    checkpoint.state = state;
    checkpoint.state.rng = generator_state();
    checkpoint.state.config = to_toml(config);
    checkpoint.state.dataset = dataset->fingerprint;
    checkpoint.state.parallax = PARALLAX_VERSION;
    checkpoint.state.torch = TORCH_VERSION;
    checkpoint.tokenizer = dataset->tokenizer;
    for (const auto& parameter : model->named_parameters()) {
      checkpoint.model.emplace_back(parameter.key(), *parameter);
    }
    checkpoint.optimizer = optimizer.state();
    save_checkpoint(run, checkpoint);
    last_checkpoint = checkpoint.path;
    prune_checkpoints(run, config.train.keep_last, config.train.trunk_steps);
    observer.on_checkpoint(checkpoint.path);
  }

  Config config;
  fs::path run;
  at::Device device;
  std::shared_ptr<const Dataset> dataset;
  BatchSampler sampler;
  std::vector<Batch> val;
  std::shared_ptr<CausalLm> model;
  Optimizer optimizer;
  std::vector<at::Tensor> parameters;
  std::unique_ptr<FolderLock> lock;
  std::unique_ptr<MetricsWriter> metrics;
  RunState state;
  std::vector<std::string> notes;
  fs::path last_checkpoint;  // empty: none yet
  // Of this session, for throughput alone.
  double train_seconds = 0;
  double window_seconds = 0;
  std::int64_t session_tokens = 0;
  std::int64_t pending_tokens = 0;  // since the last logged step
};

Trainer::Trainer(const Config& config, const std::filesystem::path& run, bool resume)
    : impl_(std::make_unique<Impl>(config, run, resume)) {}

Trainer::~Trainer() = default;

TrainResult Trainer::run(TrainObserver& observer, const std::atomic<bool>* stop) {
  return impl_->train(observer, stop);
}

std::int64_t Trainer::step() const { return impl_->state.step; }

std::vector<Assignment> Trainer::assignments() const { return impl_->optimizer.assignments(); }

const std::vector<std::string>& Trainer::notes() const { return impl_->notes; }

}  // namespace parallax::lm
