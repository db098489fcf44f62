// SPDX-License-Identifier: MIT
// A step of generation, end to end, beside the memory traffic that bounds it: a model of a config's
// shape with random weights, a cache that is full of random keys and values up to a context, one
// token more for each sequence; Parallax and its softmax twin.
//   bench_generate --config configs/0.6b.toml --context 4096 --batch 1 64 [--device cuda] [--json
//   F] [--trace F]
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/torch.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "lm/decode_step.h"
#include "lm/device.h"
#include "lm/error.h"

namespace parallax::bench {
namespace {

using nlohmann::json;
using Clock = std::chrono::steady_clock;

constexpr int kWarmUps = 3;

struct Options {
  std::string config = "configs/0.6b.toml";
  std::vector<std::int64_t> batches = {1, 64};
  std::vector<std::string> mixers = {"parallax", "softmax"};
  std::int64_t context = 4096;
  std::int64_t steps = 50;
  std::int64_t page_size = 64;
  std::string device = "auto";
  std::string json;
  std::string trace;
};

void synchronize(at::Device device) {
  if (device.is_cuda()) torch::cuda::synchronize(device.index());
}

// Seconds of work that has ended when this returns.
double seconds_of(at::Device device, const std::function<void()>& work) {
  synchronize(device);
  const auto start = Clock::now();
  work();
  synchronize(device);
  return std::chrono::duration<double>(Clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ssize(values) / 2, values.end());
  return values[values.size() / 2];
}

// Bytes a second that a sum over much more than the caches reads: the best of several rounds.
double read_bandwidth(at::Device device) {
  const std::int64_t count = device.is_cuda() ? std::int64_t{1} << 30 : std::int64_t{1} << 27;
  const at::Tensor data = at::ones({count}, at::TensorOptions(at::kFloat).device(device));
  double best = 0;
  for (int round = 0; round < 10; ++round) {
    const double seconds = seconds_of(device, [&] { data.sum(); });
    best = std::max(best, static_cast<double>(data.nbytes()) / seconds);
  }
  return best;
}

std::unique_ptr<lm::CausalLm> make_model(lm::Config config, const std::string& mixer,
                                         const Options& options) {
  config.model.mixer = mixer;
  config.train.dtype = "auto";
  auto model = std::make_unique<lm::CausalLm>(config.model, 0);
  lm::place_model(*model, config.train, options.device);
  return model;
}

// A model and a full cache.
class Subject {
 public:
  Subject(lm::CausalLm& model, std::int64_t batch, const Options& options)
      : model_(model),
        batch_(batch),
        cache_(model.make_cache(shape_of(model, batch, options))),
        step_(model, cache_),
        tokens_(static_cast<std::size_t>(batch), 1) {
    const at::NoGradGuard no_grad;
    for (std::int64_t layer = 0; layer < model.config().num_layers; ++layer) {
      cache_.k(layer).normal_();
      cache_.v(layer).normal_();
    }
    for (std::int64_t row = 0; row < batch; ++row) {
      cache_.reserve(row, options.context + options.steps);
      cache_.append({row, 1}, options.context - options.steps / 2 - kWarmUps);
    }
  }

  // Seconds from one step's tokens to the next one's, always the likeliest, as generation makes
  // them: on a GPU the next step is under way before the last one's tokens are known here.
  std::vector<double> timed_steps(std::int64_t count) {
    std::vector<double> seconds;
    if (!step_.greedy()) {
      while (std::ssize(seconds) < count) seconds.push_back(timed_step(/*eager=*/false));
      return seconds;
    }
    step_.start(tokens_);
    auto last = Clock::now();
    while (std::ssize(seconds) < count) {
      if (std::ssize(seconds) + 1 < count) step_.start_next();
      tokens_ = step_.take();
      seconds.push_back(std::chrono::duration<double>(Clock::now() - last).count());
      last = Clock::now();
    }
    return seconds;
  }

  // One step with a wait at its end.
  double timed_step(bool eager) {
    return seconds_of(model_.device(), [&] {
      const at::Tensor logits = eager ? step_.run_eager(tokens_) : step_(tokens_);
      const at::Tensor ids = logits.argmax(1).to(at::kInt).cpu();
      tokens_.assign(ids.const_data_ptr<std::int32_t>(),
                     ids.const_data_ptr<std::int32_t>() + batch_);
    });
  }

  // What the newest step read: every weight, and all keys and values.
  double bytes() {
    const lm::ModelConfig& config = model_.config();
    double sum = 0;
    for (const at::Tensor& weight : model_.parameters())
      sum += static_cast<double>(weight.nbytes());
    if (!config.tie_embeddings) {  // of the embedding it read a few rows
      sum -= static_cast<double>(model_.parameters().front().nbytes());
    }
    const std::int64_t token_bytes =
        2 * config.num_layers * config.num_kv_heads * config.head_dim * cache_.k(0).element_size();
    for (std::int64_t row = 0; row < batch_; ++row) {
      sum += static_cast<double>(cache_.len(row) * token_bytes);
    }
    return sum;
  }

 private:
  // Room for what the measurement appends: `context` is the length in the middle of it.
  static lm::KvCacheShape shape_of(const lm::CausalLm& model, std::int64_t batch,
                                   const Options& options) {
    lm::KvCacheShape shape;
    shape.batch = lm::DecodeStep::rows_for(batch, model.device());
    shape.page_size = options.page_size;
    shape.max_len = options.context + options.steps;
    shape.num_pages = batch * ((shape.max_len + shape.page_size - 1) / shape.page_size);
    return shape;
  }

  lm::CausalLm& model_;
  std::int64_t batch_;
  lm::KvCache cache_;
  lm::DecodeStep step_;
  std::vector<std::int32_t> tokens_;
};

// Three steps on the GPU, kernel by kernel, for chrome://tracing.
void write_trace(Subject& subject, const std::string& path) {
  namespace profiler = torch::autograd::profiler;
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  const std::set activities{torch::profiler::impl::ActivityType::CPU,
                            torch::profiler::impl::ActivityType::CUDA};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  subject.timed_steps(3);
  profiler::disableProfiler()->save(path);
}

json measure(Subject& subject, const std::string& mixer, std::int64_t batch, double bandwidth,
             std::int64_t steps) {
  std::vector<double> eager;
  subject.timed_steps(kWarmUps);
  const std::vector<double> graph = subject.timed_steps(steps);
  const double floor = subject.bytes() / bandwidth;
  for (std::int64_t i = 0; i < steps / 4; ++i) eager.push_back(subject.timed_step(true));
  const double step = median(graph);
  std::printf("%-9s %5lld %10.3f %10.3f %10.3f %7.2fx %12.0f\n", mixer.c_str(),
              static_cast<long long>(batch), 1e3 * floor, 1e3 * step, 1e3 * median(eager),
              step / floor, static_cast<double>(batch) / step);
  std::fflush(stdout);
  return {{"mixer", mixer},
          {"batch", batch},
          {"floor_s", floor},
          {"step_s", step},
          {"eager_step_s", median(eager)},
          {"over_floor", step / floor},
          {"tokens_per_s", static_cast<double>(batch) / step}};
}

void run(const Options& options) {
  const lm::Config config = lm::load_config(options.config);
  const at::Device device = lm::resolve_device(options.device);
  const double bandwidth = read_bandwidth(device);
  std::printf("%s, context %lld, %s; reads %.0f GB/s\n", options.config.c_str(),
              static_cast<long long>(options.context), device.str().c_str(), bandwidth / 1e9);
  std::printf("%-9s %5s %10s %10s %10s %8s %12s\n", "mixer", "batch", "floor ms", "step ms",
              "eager ms", "", "tokens/s");
  json results = json::array();
  for (const std::string& mixer : options.mixers) {
    const auto model = make_model(config, mixer, options);
    for (const std::int64_t batch : options.batches) {
      Subject subject(*model, batch, options);
      results.push_back(measure(subject, mixer, batch, bandwidth, options.steps));
      if (!options.trace.empty() && results.size() == 1) write_trace(subject, options.trace);
    }
  }
  if (options.json.empty()) return;
  std::ofstream(options.json) << json{{"config", options.config},
                                      {"context", options.context},
                                      {"device", device.str()},
                                      {"bytes_per_s", bandwidth},
                                      {"results", results}}
                                     .dump(2)
                              << "\n";
}

}  // namespace
}  // namespace parallax::bench

int main(int argc, char** argv) {
  parallax::bench::Options options;
  CLI::App app{"A step of generation beside the memory traffic that bounds it"};
  app.add_option("--config", options.config, "Shape of the model")->capture_default_str();
  app.add_option("--batch", options.batches, "Sequences")->check(CLI::PositiveNumber);
  app.add_option("--mixer", options.mixers, "parallax, softmax or both")
      ->check(CLI::IsMember({"parallax", "softmax"}));
  app.add_option("--context", options.context, "Tokens that each has")
      ->check(CLI::Range(128, 1 << 20))
      ->capture_default_str();
  app.add_option("--steps", options.steps, "Steps timed")
      ->check(CLI::Range(4, 64))
      ->capture_default_str();
  app.add_option("--page-size", options.page_size, "Of the cache, in tokens")
      ->capture_default_str();
  app.add_option("--device", options.device, "auto, cpu, cuda or cuda:N")->capture_default_str();
  app.add_option("--json", options.json, "Write the figures to this file too");
  app.add_option("--trace", options.trace,
                 "Write three steps of the first row, for chrome://tracing");
  CLI11_PARSE(app, argc, argv);
  try {
    parallax::bench::run(options);
  } catch (const std::exception& error) {
    const std::string message = error.what();
    std::fprintf(stderr, "bench_generate: %s\n", message.substr(0, message.find('\n')).c_str());
    return 1;
  }
}
