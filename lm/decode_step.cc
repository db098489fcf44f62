// SPDX-License-Identifier: MIT
#include "lm/decode_step.h"

#include <algorithm>
#include <bit>
#include <map>
#include <utility>

#ifdef PARALLAX_TORCH_CUDA
#include <ATen/cuda/CUDAGraph.h>
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

// Captured steps by number of rows and by whether the rows lay in one piece, on which a mixer may
// choose its kernel.
struct DecodeStep::Graphs {
  using Key = std::pair<std::int64_t, bool>;
  struct Step {
    at::cuda::CUDAGraph graph;
    at::Tensor logits;
  };

  // `forward` runs once before it is captured, so that libraries have set themselves up; what it
  // writes to the cache it writes again.
  template <class Forward>
  const at::Tensor& replay(Key key, at::Device device, const Forward& forward) {
    std::unique_ptr<Step>& step = steps[key];
    if (!step) step = capture(device, forward);
    step->graph.replay();
    return step->logits;
  }

  template <class Forward>
  std::unique_ptr<Step> capture(at::Device device, const Forward& forward) {
    auto step = std::make_unique<Step>();
    const c10::cuda::CUDAStream current = c10::cuda::getCurrentCUDAStream(device.index());
    const c10::cuda::CUDAStream side =
        c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index());
    current.synchronize();
    {
      const StreamScope scope(side);
      forward();
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
};

#else

struct DecodeStep::Graphs {};

#endif

std::int64_t DecodeStep::rows_for(std::int64_t count, at::Device device) {
  if (device.is_cpu() || count > kRowsAtOnce) return divide_up(count, kRowsAtOnce) * kRowsAtOnce;
  return static_cast<std::int64_t>(std::bit_ceil(static_cast<std::uint64_t>(count)));
}

DecodeStep::DecodeStep(CausalLm& model, KvCache& cache) : model_(model), cache_(cache) {
#ifdef PARALLAX_TORCH_CUDA
  if (model.device().is_cuda()) graphs_ = std::make_unique<Graphs>();
#endif
}

DecodeStep::~DecodeStep() = default;

at::Tensor DecodeStep::operator()(const std::vector<std::int32_t>& tokens) {
#ifdef PARALLAX_TORCH_CUDA
  if (graphs_) {
    const RowRange rows{0, begin(tokens)};
    const auto count = static_cast<std::int64_t>(tokens.size());
    return graphs_
        ->replay({rows.count, cache_.in_one_piece(rows)}, model_.device(),
                 [&] { return forward(rows); })
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

std::int64_t DecodeStep::begin(const std::vector<std::int32_t>& tokens) {
  cache_.append(0, tokens);
  return rows_for(static_cast<std::int64_t>(tokens.size()), model_.device());
}

at::Tensor DecodeStep::forward(RowRange rows) {
  return model_.decode(cache_.newest(rows), cache_, rows);
}

}  // namespace parallax::lm
