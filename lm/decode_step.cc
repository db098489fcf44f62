// SPDX-License-Identifier: MIT
#include "lm/decode_step.h"

#include <algorithm>
#include <bit>
#include <deque>
#include <map>
#include <tuple>
#include <utility>

#include "lm/error.h"
#include "ops/step.h"

#ifdef PARALLAX_TORCH_CUDA
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace parallax::lm {
namespace {

constexpr std::int64_t kRowsAtOnce = 8;  // on a CPU

std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

#ifdef PARALLAX_TORCH_CUDA

namespace {

// LibTorch's own guard would ask for the CUDA runtime at link time.
class StreamScope {
 public:
  explicit StreamScope(c10::cuda::CUDAStream stream)
      : before_(c10::cuda::getCurrentCUDAStream(stream.device_index())) {
    c10::cuda::setCurrentCUDAStream(stream);
  }
  ~StreamScope() { c10::cuda::setCurrentCUDAStream(before_); }
  StreamScope(const StreamScope&) = delete;
  StreamScope& operator=(const StreamScope&) = delete;

 private:
  c10::cuda::CUDAStream before_;
};

}  // namespace

// Captured steps by number of rows, by whether the rows lay in one piece, on which a mixer may
// choose its kernel, and by whether they are greedy.
struct DecodeStep::Graphs {
  using Key = std::tuple<std::int64_t, bool, bool>;
  struct Step {
    at::cuda::CUDAGraph graph;
    at::Tensor logits;  // of a step that is not greedy
  };
  // A greedy step whose tokens nobody has taken.
  struct Started {
    std::vector<std::int64_t> places;  // in `found`, of each row
    c10::Event ended;
  };

  Graphs(const KvCache& cache, at::Device device)
      : words(at::zeros({cache.batch()}, at::TensorOptions(at::kLong).device(device))),
        found(at::zeros({cache.batch(), 2}, at::TensorOptions(at::kInt).pinned_memory(true))) {}
  ~Graphs() {  // `found` outlives who writes to it
    for (const Started& one : started) one.ended.synchronize();
  }
  Graphs(const Graphs&) = delete;
  Graphs& operator=(const Graphs&) = delete;

  // `warm_up` runs once before `forward` is captured, so that libraries have set themselves up;
  // what it writes to the cache is written again.
  template <class WarmUp, class Forward>
  const at::Tensor& replay(Key key, at::Device device, const WarmUp& warm_up,
                           const Forward& forward) {
    std::unique_ptr<Step>& step = steps[key];
    if (!step) step = capture(device, warm_up, forward);
    step->graph.replay();
    return step->logits;
  }

  template <class WarmUp, class Forward>
  std::unique_ptr<Step> capture(at::Device device, const WarmUp& warm_up, const Forward& forward) {
    auto step = std::make_unique<Step>();
    const c10::cuda::CUDAStream current = c10::cuda::getCurrentCUDAStream(device.index());
    const c10::cuda::CUDAStream side =
        c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index());
    current.synchronize();
    {
      const StreamScope scope(side);
      warm_up();
      side.synchronize();
      step->graph.capture_begin(pool, cudaStreamCaptureModeThreadLocal);
      step->logits = forward();
      step->graph.capture_end();
    }
    pool = step->graph.pool();
    return step;
  }

  std::map<Key, std::unique_ptr<Step>> steps;
  at::cuda::MempoolId_t pool{0, 0};  // shared: no two steps run at once
  at::Tensor words, found;           // of greedy steps (ops::next_tokens), of all rows
  std::deque<Started> started;
  std::int64_t count = 0;  // tokens of the newest of them
};

#else

struct DecodeStep::Graphs {};

#endif

std::int64_t DecodeStep::rows_for(std::int64_t count, at::Device device) {
  if (device.is_cpu() || count > kRowsAtOnce) return divide_up(count, kRowsAtOnce) * kRowsAtOnce;
  return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(count)));
}

DecodeStep::DecodeStep(CausalLm& model, KvCache& cache, std::int64_t num_tokens)
    : model_(model),
      cache_(cache),
      num_tokens_(num_tokens > 0 ? std::min(num_tokens, model.config().vocab_size)
                                 : model.config().vocab_size) {
#ifdef PARALLAX_TORCH_CUDA
  if (model.device().is_cuda()) graphs_ = std::make_unique<Graphs>(cache, model.device());
#endif
}

DecodeStep::~DecodeStep() = default;

at::Tensor DecodeStep::operator()(const std::vector<std::int32_t>& tokens) {
#ifdef PARALLAX_TORCH_CUDA
  if (graphs_) {
    const RowRange rows{0, begin(tokens)};
    const auto count = static_cast<std::int64_t>(tokens.size());
    const auto step = [&] { return forward(rows); };
    return graphs_
        ->replay({rows.count, cache_.in_one_piece(rows), /*greedy=*/false}, model_.device(), step,
                 step)
        .narrow(0, 0, count);
  }
#endif
  return run_eager(tokens);
}

at::Tensor DecodeStep::run_eager(const std::vector<std::int32_t>& tokens) {
  const std::int64_t rows = begin(tokens);
  const std::int64_t at_once = model_.device().is_cpu() ? kRowsAtOnce : rows;
  std::vector<at::Tensor> logits;
  for (std::int64_t row = 0; row < rows; row += at_once) logits.push_back(forward({row, at_once}));
  return at::cat(logits).narrow(0, 0, static_cast<std::int64_t>(tokens.size()));
}

#ifdef PARALLAX_TORCH_CUDA

void DecodeStep::start(const std::vector<std::int32_t>& tokens) {
  if (!greedy()) throw Error("steps that feed one another: they are for a GPU");
  begin(tokens);
  replay_greedy(static_cast<std::int64_t>(tokens.size()));
}

void DecodeStep::start_next() {
  cache_.append_counted({0, graphs_->count});
  replay_greedy(graphs_->count);
}

std::vector<std::int32_t> DecodeStep::take() {
  const Graphs::Started& oldest = graphs_->started.front();
  oldest.ended.synchronize();
  const auto* found = graphs_->found.const_data_ptr<std::int32_t>();
  std::vector<std::int32_t> tokens;
  for (const std::int64_t place : oldest.places) tokens.push_back(found[place]);
  graphs_->started.pop_front();
  return tokens;
}

// The rows' `count` newest tokens are counted.
void DecodeStep::replay_greedy(std::int64_t count) {
  const RowRange rows{0, rows_for(count, model_.device())};
  const at::Tensor words = graphs_->words.narrow(0, 0, rows.count);
  const at::Tensor newest = cache_.newest(rows);
  const auto find = [&] { model_.decode_argmax(newest, cache_, rows, num_tokens_, words); };
  const auto warm_up = [&] {
    find();
    words.zero_();
  };
  const auto step_and_next = [&] {
    find();
    ops::next_tokens({words, newest.squeeze(1), cache_.positions(rows), cache_.kv_lens(rows),
                      graphs_->found.narrow(0, 0, rows.count)});
    return at::Tensor();
  };
  Graphs::Started step{{}, c10::Event(c10::DeviceType::CUDA)};
  for (std::int64_t row = 0; row < count; ++row) {
    step.places.push_back(2 * row + cache_.len(row) % 2);
  }
  graphs_->replay({rows.count, cache_.in_one_piece(rows), /*greedy=*/true}, model_.device(),
                  warm_up, step_and_next);
  step.ended.record(c10::cuda::getCurrentCUDAStream(model_.device().index()).unwrap());
  graphs_->started.push_back(std::move(step));
  graphs_->count = count;
  cache_.let_device_count({0, count});
}

#else

void DecodeStep::start(const std::vector<std::int32_t>& /*tokens*/) {
  throw Error("steps that feed one another: they are for a GPU");
}
void DecodeStep::start_next() { start({}); }
std::vector<std::int32_t> DecodeStep::take() {
  start({});
  return {};
}

#endif

std::int64_t DecodeStep::begin(const std::vector<std::int32_t>& tokens) {
  cache_.append(0, tokens);
  return rows_for(static_cast<std::int64_t>(tokens.size()), model_.device());
}

at::Tensor DecodeStep::forward(RowRange rows) {
  return model_.decode(cache_.newest(rows), cache_, rows);
}

}  // namespace parallax::lm
